"""Finds the prompt template that a checkpoint was trained with, and notes it for our own reader.

No layout states it. These are used, in this order: the user's option; a note in config.json by an
export of ours; the chat template in the folder; hints in configuration and tokenizer. A folder's
name is never used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError
from pydantic import ValidationError

from llavakit import LlavaError, ModelError, PromptTemplate, Registry, Turn, Use, without_none
from llavakit.contracts.data import IMAGE
from llavakit_plugins.templates.bounds import TEMPLATE_FAULTS, check_bounds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateUse = Use[PromptTemplate]

NOTE = "llavakit"
"""The table that our exports add to config.json."""

_log = logging.getLogger("llavakit")
_QUESTION = "Which of them is it?"
_ASKED = (Turn("human", f"{IMAGE}\n{_QUESTION}"),)
_USUAL = "vicuna_v1"
"""LLaVA-1.5 was trained with it, and its benchmarks use it."""


def choose_template(
    asked: str | None,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    registry: Registry,
    where: object,
    guess: tuple[str, str] | None = None,
) -> TemplateUse:
    """Return the template, and log which one and why where it is a guess.

    `guess` is a template's name and the reason, from what only the layout's reader knows. A chat
    template that no built-in one equals is put into the tokenizer in the form that the template
    `chat-template` reads.
    """
    if asked is not None:
        registry.get(PromptTemplate, asked)
        return TemplateUse(use=asked)
    noted = config.get(NOTE)
    if isinstance(noted, Mapping) and isinstance(noted.get("template"), Mapping):
        return _noted(noted["template"], registry, where)
    chat = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    if guess is None and chat is not None:
        found = _same_text(chat, tokenizer, registry)
        if found is not None:
            _say(found, "the folder's chat template writes the same", where)
            return found
        tokenizer.chat_template = _of_strings(chat, tokenizer)
        use = TemplateUse(use="chat-template")
        _say(use, "the folder's chat template is none of the built-in ones", where)
        return use
    name, reason = guess or (_USUAL, "nothing in the folder says which; LLaVA-1.5 was tuned on it")
    use = TemplateUse(use=name)
    _say(use, reason, where)
    return use


def _noted(table: Mapping[str, Any], registry: Registry, where: object) -> TemplateUse:
    try:
        use = TemplateUse.model_validate(table)
        registry.build(use)
    except (LlavaError, ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{where}: config.json notes a prompt template that cannot be used ({reason}); choose "
            "another with --template"
        ) from error
    return use


def _say(use: TemplateUse, reason: str, where: object) -> None:
    options = "".join(f", {key} = {json.dumps(value)}" for key, value in use.options.items())
    _log.warning(
        "note: prompt template `%s`%s for %s: %s; choose another with --template",
        use.use, options, where, reason,
    )  # fmt: skip


# -- reading a chat template -----------------------------------------------------------------------


def _same_text(
    chat: str, tokenizer: PreTrainedTokenizerBase, registry: Registry
) -> TemplateUse | None:
    """Return the built-in template that asks a question about an image with the same text."""
    texts = {_rendered(chat, tokenizer, question) for question in _questions()}
    # some chat templates write the beginning token, and some leave it to the tokenizer
    texts = {_without_bos(text, tokenizer) for text in texts if text is not None}
    # the usual template first, as several may write one question with the same text
    for name in sorted(registry.all(PromptTemplate), key=lambda name: (name != _USUAL, name)):
        # some chat templates leave out the system text that the original writes
        for options in ({}, {"system": ""}):
            try:
                use = TemplateUse.model_validate({"use": name, **options})
                template = registry.build(use)
                segments = template.segments(_ASKED, tokenizer)
            except (LlavaError, ValidationError):
                continue  # it has no such option, or the tokenizer lacks what it needs
            if name == "chat-template" or "".join(s.text for s in segments) not in texts:
                continue
            return use
    return None


def _questions() -> Iterator[Any]:
    """Yield a question about an image in the ways that chat templates take it."""
    image, text = {"type": "image"}, {"type": "text", "text": _QUESTION}
    yield [image, text]
    yield f"{IMAGE}\n{_QUESTION}"


def _rendered(chat: str, tokenizer: PreTrainedTokenizerBase, content: Any) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": content}]
    check_bounds(chat, tokenizer.special_tokens_map, messages)
    render = cast(Any, render_jinja_template)
    try:
        texts, _ = render(
            conversations=[messages],
            chat_template=chat,
            add_generation_prompt=True,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, *TEMPLATE_FAULTS):
        return None
    text: str = texts[0]
    # a template made for texts may show a list of parts as nothing at all, without an error
    return text if _QUESTION in text else None


def _without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return text.removeprefix(tokenizer.bos_token or "")


def _of_strings(chat: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat template as our `chat-template` reads it.

    It takes a message's text as a string, and begins with the beginning token where the tokenizer
    would put that in front of the text.
    """
    *_, plain = _questions()
    if _rendered(chat, tokenizer, plain) is None:
        chat = _WRAPPED + chat
    text = _rendered(chat, tokenizer, plain)
    if text is None:
        raise ModelError(
            "the folder's chat template cannot be used for a question about an image; choose a "
            "template with --template"
        )
    bos = tokenizer.bos_token
    adds = bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{- bos_token -}}" + chat if adds and not text.startswith(str(bos)) else chat


_WRAPPED = (
    "{%- set wrapped = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] "
    "if message['content'] is string else message['content'] -%}"
    "{%- set wrapped.messages = wrapped.messages + "
    "[{'role': message['role'], 'content': parts}] -%}"
    "{%- endfor -%}{%- set messages = wrapped.messages -%}"
)


def note_template(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an export notes of the template, for `choose_template`."""
    if choice["use"] == "chat-template":  # its options are in the chat template that is written
        return {"template": {"use": "chat-template"}}
    return {"template": without_none(dict(choice))}
