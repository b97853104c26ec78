"""Finds out how a prompt template writes questions, and writes a chat template in Jinja for it.

Every layout that other libraries read has its chat template from here: transformers and
transformers.js do not know our templates. So the model's own template, also one of
a plugin, renders placeholders for questions and answers, and their surroundings are read off.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llavakit import DataError, LlavaError, ModelError, Reader, Turn
from llavakit.contracts.data import IMAGE
from llavakit_plugins.checkpoints.families import VIDEO
from llavakit_plugins.checkpoints.prompt_format import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavakit import PromptTemplate

# Plain words: a template may change or refuse special characters, and leaves these as they are.
_QUESTION, _ANSWER = "stand-in-{}-for-a-question", "stand-in-{}-for-an-answer"
_SYSTEM = "stand-in-for-a-system-text"


def find_format(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return how a template writes the prompt of one question.

    Raises ModelError for a template whose prompt is not the question between two fixed texts.
    """
    placeholder = _QUESTION.format(0)
    shown = _render(template, tokenizer, f"{IMAGE}\n{placeholder}")
    if placeholder not in shown:
        form = _images_only(template, tokenizer, shown)
    else:
        # without an image first: what is in front of the
        # question and behind it then holds no image's text
        head, ask = _split(_render(template, tokenizer, placeholder), placeholder, template.name)
        unit = (
            shown.removeprefix(head).removesuffix(ask).replace(placeholder, "").removesuffix("\n")
        )
        # a mark within the text shows whether the template moves images to the front
        apart = _render(template, tokenizer, f"a{IMAGE}b")
        trimmed = _render(template, tokenizer, f" {placeholder} ") == f"{head}{placeholder}{ask}"
        form = PromptFormat(
            template=template.name,
            head=head,
            ask=ask,
            image=unit,
            placement="front" if apart == f"{head}{unit}\nab{ask}" else "keep",
            shows_question=True,
            trims=trimmed,
            adds_bos=template.adds_bos,
            beginning=tuple(Reader.of(tokenizer).beginning()),
            between=_between(template, tokenizer, head, ask),
            end=_end(template, tokenizer),
            trims_answers=_trims_answers(template, tokenizer),
            system=_system(template, tokenizer, ask),
            bare=_bare(template, tokenizer, ask),
            stops=tuple(template.stop(tokenizer)),
        )
    _check(form, template, tokenizer)
    # one question can be written, and earlier turns cannot:
    # the export then says so, instead of failing
    if not _keeps_history(form, template, tokenizer):
        return form.model_copy(update={"between": None})
    return form


def chat_template(form: PromptFormat, *, space_behind_image: bool, videos: bool = False) -> str:
    """Return a chat template in Jinja that renders `messages` as the model's template does.

    A message's content is a text, or a list of `{"type": "image"}` and `{"type": "text", "text":
    ...}`, with `videos` also of `{"type": "video"}`, which becomes `<video>`. Some tokenizers add a
    space before every text. We tokenise the text behind an image as a text of its own, so for them
    `space_behind_image` writes that space out.
    """
    image = form.image.replace(IMAGE, f"{IMAGE} ") if space_behind_image else form.image
    mark, line = _quote(image), _quote(image + "\n")
    moving = _quote(IMAGE)  # how a video's part is written among the texts
    if videos and form.placement == "keep":
        moving = _quote(image.replace(IMAGE, VIDEO))
    # transformers' processors give a list of parts, and our own code gives a text with marks: a
    # list becomes that text here, as `read_messages` joins it
    listed = (
        "{%- set joined = namespace(text='') -%}\n"
        "{%- for part in content -%}\n"
        f"{{%- set one = {_quote(IMAGE)} if part['type'] in ['image', 'image_url'] else "
        f"{moving} if part['type'] == 'video' else part['text'] -%}}\n"
        "{%- set joined.text = joined.text + ('' if loop.first else '\\n') + one -%}\n"
        "{%- endfor -%}\n"
        "{%- set content = joined.text -%}\n"
    )
    if videos:
        listed = (
            "{%- set kinds = content | selectattr('type', 'in', ['image', 'video']) "
            "| map(attribute='type') | list -%}\n" + listed
        )
        moves = "kinds is defined and kinds[loop.index0] == 'video'"  # a text has none
        mark, line = (
            f"({_quote(one.replace(IMAGE, VIDEO))} if {moves} else {_quote(one)})"
            for one in (image, image + "\n")
        )
    trimmed = " | trim" if form.trims else ""
    if form.placement == "front":
        text = (
            "{%- set images = content.split('<image>') | length - 1 -%}\n"
            "{%- if images -%}{%- set texts = content | replace('<image>', '') | trim -%}\n"
            f"{{%- else -%}}{{%- set texts = content{trimmed} -%}}{{%- endif -%}}\n"
        )
    else:
        kept = f"content{trimmed} | replace('<image>', {_quote(image)})"
        text = f"{{%- set images = 0 -%}}{{%- set texts = {kept} -%}}\n"
    if form.shows_question:
        body = (
            "{%- for _ in range(images) -%}"
            f"{{{{- {line} if texts or not loop.last else {mark} -}}}}"
            "{%- endfor -%}\n{{- texts -}}\n"
        )
    else:
        body = f"{{%- for _ in range(images) -%}}{{{{- {mark} -}}}}{{%- endfor -%}}\n"
    answer, following = form.between or ("", "")
    again = (
        f"{{{{- {_quote(answer)} -}}}}{{{{- content{' | trim' if form.trims_answers else ''} -}}}}"
        f"{{%- if loop.last -%}}{{{{- {_quote(form.end)} -}}}}{{%- endif -%}}"
        if form.between
        else "{{- raise_exception('this model answers one question, without earlier ones') -}}"
    )
    return (
        "{%- for message in messages -%}\n"
        "{%- set content = message['content'] -%}\n"
        "{%- if message['role'] == 'user' -%}\n"
        f"{{{{- {_quote(form.head)} if loop.first else {_quote(following)} -}}}}\n"
        f"{{%- if content is not string -%}}\n{listed}{{%- endif -%}}\n"
        f"{text}{body}"
        "{%- elif message['role'] == 'assistant' -%}\n"
        "{%- if content is not string -%}"
        "{%- set content = content | map(attribute='text') | join('\\n') -%}{%- endif -%}\n"
        f"{again}\n"
        "{%- else -%}\n"
        "{{- raise_exception('the system text of this model is fixed; give it none') -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        f"{{%- if add_generation_prompt -%}}{{{{- {_quote(form.ask)} -}}}}{{%- endif -%}}"
    )


def _quote(text: str) -> str:
    # a JSON string is a string of Jinja, too; not as ASCII, where JSON writes an emoji as two
    # surrogates, which Jinja does not join
    return json.dumps(text, ensure_ascii=False)


def _turns(texts: Sequence[str]) -> list[Turn]:
    return [Turn(("human", "gpt")[n % 2], text) for n, text in enumerate(texts)]


def _render(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *texts: str) -> str:
    return "".join(segment.text for segment in template.segments(_turns(texts), tokenizer))


def _attempt(
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *texts: str,
    system: str | None = None,
) -> str | None:
    """Return a conversation as the template writes it; None where it refuses to."""
    try:
        if system is not None:
            template = template.with_system(system)
        return _render(template, tokenizer, *texts)
    except LlavaError:  # it takes one question only, say, or no system text
        return None


def _split(text: str, mark: str, name: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ModelError(
            f"prompt template `{name}` shows a question {text.count(mark)} times, which a chat "
            "template in Jinja cannot be made of; use another template"
        )
    before, _, behind = text.partition(mark)
    return before, behind


def _images_only(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, shown: str
) -> PromptFormat:
    return PromptFormat(
        template=template.name,
        head="",
        ask="",
        image=shown,
        placement="front",
        shows_question=False,
        trims=False,
        adds_bos=template.adds_bos,
        beginning=tuple(Reader.of(tokenizer).beginning()),
        between=None,
        stops=tuple(template.stop(tokenizer)),
    )


def _between(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, head: str, ask: str
) -> tuple[str, str] | None:
    """Return the texts before and behind an answer if they are the same in all turns, else None."""
    # three questions: the text between turns has to be
    # the same after the first answer and the second
    marks = [mark.format(number) for number in range(2) for mark in (_QUESTION, _ANSWER)] + [
        _QUESTION.format(2)
    ]
    text = _render(template, tokenizer, *marks)
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    same = parts[0] == head and text == ask and parts[1] == parts[3] and parts[2] == parts[4]
    return (parts[1], parts[2]) if same else None


def _end(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what stands behind the last answer of a whole conversation."""
    question, answer = _QUESTION.format(0), _ANSWER.format(0)
    try:
        asked = _render(template, tokenizer, question, answer, _QUESTION.format(1))
        before, _, end = _render(template, tokenizer, question, answer).partition(answer)
    except LlavaError:  # it takes one question only
        return ""
    if asked.startswith(before + answer + end):
        return end
    return next(iter(template.stop(tokenizer)), "")  # it trains with other text than it asks with


def write_chat(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *, videos: bool = False
) -> str | None:
    """Return a chat template that asks as `template` does; None where none can be made of it.

    That is so for one that rewrites or leaves out questions, as `plain` does, or takes only one.
    """
    try:
        form = find_format(template, tokenizer)
    except LlavaError:
        return None
    return chat_template(form, space_behind_image=False, videos=videos) if form.between else None


def _trims_answers(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> bool:
    spaced = _attempt(template, tokenizer, "a question", f" {_ANSWER} ", "another")
    return spaced is not None and f" {_ANSWER} " not in spaced


def _system(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, ask: str
) -> tuple[str, str] | None:
    """Return the texts in front of a conversation's system text and behind it, or None."""
    question = _QUESTION.format(0)
    text = _attempt(template, tokenizer, question, system=_SYSTEM)
    if text is None or text.count(_SYSTEM) != 1 or not text.endswith(f"{question}{ask}"):
        return None
    before, _, behind = text.removesuffix(f"{question}{ask}").partition(_SYSTEM)
    return before, behind


def _bare(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, ask: str) -> str | None:
    """Return what stands in front of the question where there is no system text."""
    question = _QUESTION.format(0)
    text = _attempt(template, tokenizer, question, system="")
    end = f"{question}{ask}"
    return text.removesuffix(end) if text is not None and text.endswith(end) else None


def _keeps_history(
    form: PromptFormat, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Say whether the form writes some conversations as the template does."""
    turns = (f"{IMAGE}\nWhat is it?", " A cat.\nIt sleeps. ", f"And {IMAGE}?", "A dog.", " Sure? ")
    systems = [None, *([_SYSTEM] if form.system else []), *([""] if form.bare is not None else [])]
    if form.between is None:
        return False
    return all(
        _attempt(template, tokenizer, *turns[:count], system=system)
        == "".join(piece.text for piece in form.pieces(_turns(turns[:count]), system))
        for count in (1, 3, 5)
        for system in systems
    )


def _check(
    form: PromptFormat, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ModelError if the form renders any of some questions in another way than the template.

    What was read off is only a guess; this checks it.
    """
    tries: Sequence[str] = (
        "What is it?",
        f"{IMAGE}\nWhat is it?",
        f"{IMAGE}\n{IMAGE}\nWhich is red?\nSay why.",
        f"Look at {IMAGE} and say what it is.",
        f"What is it?\n{IMAGE}",
        f"{IMAGE}",
    )
    for text in tries:
        try:
            expected = _render(template, tokenizer, text)
        except DataError:  # `plain` shows no question without an image
            continue
        found = "".join(piece.text for piece in form.pieces(_turns([text])))
        if found != expected:
            raise ModelError(
                f"prompt template `{template.name}` renders {text!r} as {expected!r}, which a "
                f"chat template for other clients cannot be made of (it would be {found!r}); set "
                '`image_placement = "front"`, or use another template'
            )
