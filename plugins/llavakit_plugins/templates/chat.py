"""The tokenizer's own chat template, written in Jinja, as a prompt template.

The positions of turns and of supervised text are found by rendering placeholders for the turns'
texts. Every sample is then rendered by the template itself and compared with the result, so the
text always equals that of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, pairwise, takewhile
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from llavakit import DataError, LlavaError, ModelError, PromptTemplate, Segment, Turn
from llavakit_plugins.templates.bounds import TEMPLATE_FAULTS, check_bounds
from llavakit_plugins.templates.placement import TemplateOptions, exchanges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Span = tuple[int, int]


class ChatTemplateOptions(TemplateOptions):
    """Options of `chat-template`.

    Without `system` no system message is passed, and the template may write one of its own, as
    Qwen's does. If `system` is empty, either no message or an empty one is passed: the one that
    gives less text.
    """

    variables: Mapping[str, bool | int | str] = {}
    """What else the template reads, such as `{ enable_thinking = false }`."""


@dataclass(frozen=True)
class _Skeleton:
    """A rendered conversation without its turns' texts."""

    system: tuple[Message, ...]
    supervised: tuple[bool, ...]
    """Which turns are supervised."""
    around: tuple[tuple[Segment, ...], ...]
    """The template's own text: in front of each turn, and behind the last."""

    def fill(self, texts: Sequence[str], rendered: str) -> list[Segment] | None:
        """Return the segments of a rendered conversation; None where it isn't of this shape."""
        borders = ["".join(segment.text for segment in group) for group in self.around]
        if not rendered.startswith(borders[0]):
            return None
        segments = list(self.around[0])
        position = len(borders[0])
        for number, text in enumerate(texts):
            border = borders[number + 1]
            last = number + 1 == len(texts)
            for variant in _variants(text):
                end = position + len(variant)
                fits = rendered.startswith(border, end) and rendered.startswith(variant, position)
                # behind the last text the border may be empty, which every variant would fit
                if fits and (not last or end + len(border) == len(rendered)):
                    break
            else:
                return None
            segments.append(Segment(variant, self.supervised[number]))
            segments += self.around[number + 1]
            position = end + len(border)
        return segments


def _variants(text: str) -> Iterator[str]:
    """Yield what templates make of a turn's text: it as it is, or without space around it."""
    yield text
    # a template may strip newlines alone: the spaces around them are then part of the text
    for characters in ("\n", None):
        yield text.lstrip(characters)
        yield text.rstrip(characters)
        yield text.strip(characters)


class ChatTemplate(PromptTemplate):
    """The tokenizer's own Jinja template.

    Supervised is what a template marks with `{% generation %}`. If it marks nothing, supervised is
    what the model has to write itself: from the end of the generation prompt to the first special
    token behind the answer; if none follows, also the text behind the last answer.
    """

    name = "chat-template"
    Options = ChatTemplateOptions
    adds_bos = False
    """The template writes the beginning token, if the model wants one."""

    def __init__(self, options: ChatTemplateOptions, given: tuple[str, ...] = ()) -> None:
        self._options = options
        self._given = given
        """A conversation's own system text: like a turn's, it is no markup."""
        self._skeletons: WeakKeyDictionary[
            PreTrainedTokenizerBase, dict[tuple[str, int, int], _Skeleton]
        ] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self._options, self._given)

    def with_system(self, system: str) -> ChatTemplate:
        """Return the template with a conversation's system text; an empty one is left out as the
        option's is."""
        if not system:
            return ChatTemplate(self._options.model_copy(update={"system": ""}))
        made = ChatTemplate(self._options, (system,))
        made._skeletons = self._skeletons  # which hold no text of a conversation
        return made

    def segments(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Segment]:
        """Return the text in order; after a human turn at the end it is open for the answer.

        Raises ModelError for a tokenizer without a template that can be used, DataError for a
        conversation whose texts the template rewrites.
        """
        texts = [*self._given]
        texts += [
            text
            for pair in exchanges(turns, self._options)
            for text in (pair.question, pair.answer)
            if text is not None
        ]
        source = _source(tokenizer)
        skeletons = self._skeletons.setdefault(tokenizer, {})
        shape = (source, len(texts), len(self._given))
        for attempt in range(2):
            if attempt or shape not in skeletons:  # again, as a template may write the date
                skeletons[shape] = self._skeleton(tokenizer, source, len(texts))
            skeleton = skeletons[shape]
            messages = [*skeleton.system, *_messages(texts, len(self._given))]
            rendered, _ = self._render(tokenizer, source, messages)
            segments = skeleton.fill(texts, rendered)
            if segments is not None:
                return segments
        raise DataError(
            "the tokenizer's chat template rewrites the text of a turn, so what is learned cannot "
            "be told; reword the turn (some templates cut out `<think>` or empty answers), or use "
            "another prompt template"
        )

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Return the text behind an answer, where it is not the end token."""
        source = _source(tokenizer)
        _, closing = self._edges(tokenizer, source, self._system(tokenizer, source))
        special = _special_tokens(tokenizer).search(closing)
        text = special[0] if special else closing.strip()
        return () if text in ("", tokenizer.eos_token) else (text,)

    def _skeleton(self, tokenizer: PreTrainedTokenizerBase, source: str, turns: int) -> _Skeleton:
        given = len(self._given)
        system = [] if given else self._system(tokenizer, source)
        rendered, spans = self._render(tokenizer, source, [*system, *_stand_ins(turns, given)])
        borders, starts = _split(rendered, turns)
        if spans is None:
            prompt, closing = self._edges(tokenizer, source, system)
            special = _special_tokens(tokenizer)
            spans = list(_unmarked(borders, starts, prompt, closing, special, given + 1))
        around = tuple(
            tuple(_cut(border, start, spans)) for border, start in zip(borders, starts, strict=True)
        )
        ends = [start + len(border) for start, border in zip(starts, borders, strict=True)]
        supervised = tuple(any(a <= end < b for a, b in spans) for end in ends[:-1])
        return _Skeleton(tuple(system), supervised, around)

    def _system(self, tokenizer: PreTrainedTokenizerBase, source: str) -> list[Message]:
        """Return the system message to give, if any."""
        text = self._options.system
        message = {"role": "system", "content": text or ""}
        # some templates write a system text of their own
        # without a message, some refuse an empty one
        choices: list[list[Message]] = [[message]] if text else [[], [message]]
        if text is None:
            choices = [[]]
        lengths: dict[int, list[Message]] = {}
        refusal: LlavaError | None = None
        for choice in choices:
            try:
                rendered, _ = self._render(tokenizer, source, [*choice, *_stand_ins(1)])
                lengths.setdefault(len(rendered), choice)
            except ModelError as error:
                refusal = error
        if not lengths:
            hint = "; leave `system` out" if text else ""
            raise ModelError(f"{refusal}{hint}") from refusal
        return lengths[min(lengths)]

    def _edges(
        self, tokenizer: PreTrainedTokenizerBase, source: str, system: Sequence[Message]
    ) -> tuple[str, str]:
        """Return the generation prompt, with what ends a question, and what ends an answer."""
        asked, _ = self._render(tokenizer, source, [*system, *_stand_ins(1)])
        answered, _ = self._render(tokenizer, source, [*system, *_stand_ins(2)])
        return _split(asked, 1)[0][-1], _split(answered, 2)[0][-1]

    def _render(
        self, tokenizer: PreTrainedTokenizerBase, source: str, messages: Sequence[Message]
    ) -> tuple[str, list[Span] | None]:
        """Return the text, and the stretches that the template marks as generated, if it does."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        # special tokens first: a recipe's variables may replace them, as in `apply_chat_template`
        variables: dict[str, Any] = {**tokenizer.special_tokens_map, **self._options.variables}
        check_bounds(source, variables, messages)
        marks = _GENERATION.search(source) is not None
        render = cast("Callable[..., tuple[list[str], list[list[Span]]]]", render_jinja_template)
        try:
            texts, spans = render(
                conversations=[list(messages)],
                chat_template=source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=messages[-1]["role"] == "user",
                **variables,
            )
        except (TemplateError, *TEMPLATE_FAULTS) as error:
            raise ModelError(
                f"the tokenizer's chat template refuses a conversation: "
                f"{' '.join(str(error).split()) or type(error).__name__}"
            ) from error
        return texts[0], spans[0] if marks else None


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = re.compile("\ufdd0([0-9]+)\ufdd1")  # noncharacters: no text has them


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ModelError(
            "the tokenizer has no chat template; use another prompt template, such as `chatml`"
        ) from error


def _messages(texts: Sequence[str], given: int = 0) -> list[Message]:
    """Return texts as messages, of which `given`, none or one, is the system's."""
    roles = chain(("system",) * given, cycle(("user", "assistant")))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def _stand_ins(turns: int, given: int = 0) -> list[Message]:
    return _messages([f"\ufdd0{number}\ufdd1" for number in range(turns)], given)


def _split(rendered: str, turns: int) -> tuple[list[str], list[int]]:
    """Return the texts around the stand-ins, and where each begins."""
    marks = list(_STAND_IN.finditer(rendered))
    if [int(mark[1]) for mark in marks] != list(range(turns)):
        raise ModelError(
            "the tokenizer's chat template leaves out, repeats or reorders turns, so what is "
            "learned cannot be told; use another prompt template"
        )
    starts = [0, *(mark.end() for mark in marks)]
    ends = [*(mark.start() for mark in marks), len(rendered)]
    return [rendered[start:end] for start, end in zip(starts, ends, strict=True)], starts


def _unmarked(
    borders: Sequence[str],
    starts: Sequence[int],
    prompt: str,
    closing: str,
    special: re.Pattern[str],
    first: int,
) -> Iterator[Span]:
    """Yield the supervised parts of a template that marks nothing; `first` is the first answer."""
    for answer in range(first, len(borders) - 1, 2):  # between borders[answer] and the next
        given = _shared(borders[answer], prompt)
        behind = borders[answer + 1]
        end = special.search(behind)
        written = end.end() if end else _shared(behind, closing)
        yield starts[answer] + given, starts[answer + 1] + written


def _shared(a: str, b: str) -> int:
    """Return how many characters two texts have in common from their start on."""
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _cut(border: str, start: int, spans: Sequence[Span]) -> Iterator[Segment]:
    """Yield the template's text, cut where supervision begins or ends."""
    inside = {edge - start for span in spans for edge in span}
    cuts = sorted({0, len(border), *(edge for edge in inside if 0 < edge < len(border))})
    for begin, end in pairwise(cuts):
        supervised = any(a <= start + begin < b for a, b in spans)
        yield Segment(border[begin:end], supervised, markup=True)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    tokens = [token for token in tokenizer.get_added_vocab() if token.strip()]
    # the longest first, as a regular expression takes the first that fits:
    # `<|im_end|>` before `<|im`
    tokens.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
