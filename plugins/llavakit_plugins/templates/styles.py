"""The styles of writing a conversation as text, and which parts of it are supervised.

A style takes a format, the system text and the exchanges. Supervised is what the original's label
masks leave: the space before an answer, the answer, and its end token or separator. So the first
token of the answer is supervised as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from llavakit import DataError, Segment
from llavakit.contracts.data import IMAGE
from llavakit_plugins.templates.placement import Exchange


class Frame(NamedTuple):
    """What stands around the turns."""

    system: Segment
    """Markup where it is the template's or a recipe's, and none where a conversation brings it."""
    roles: tuple[str, str]
    begin: str
    """Written in front of every exchange but the first (the tokenizer begins that one)."""
    end: str
    """The tokenizer's end token."""
    example: tuple[Exchange, ...] = ()


Style: TypeAlias = Callable[[Frame, Sequence[Exchange]], Iterator[Segment]]


def image_and_caption(frame: Frame, exchanges: Sequence[Exchange]) -> Iterator[Segment]:
    """`<image>caption\\n`: the question is not shown (the original's stage 1 from v1.0 on)."""
    question, answer = exchanges[0].question, exchanges[0].answer
    if len(exchanges) > 1 or IMAGE not in question:
        raise DataError(
            "the template `plain` shows one image and its caption, and leaves out the question; "
            "conversations, and samples without an image, need another template"
        )
    yield Segment(IMAGE * question.count(IMAGE))
    if answer is not None:
        # the newline ends a caption: as in the original, no end token is learned here
        yield Segment(answer, supervised=True)
        yield _markup("\n", supervised=True)


def roles_and_end_token(frame: Frame, exchanges: Sequence[Exchange]) -> Iterator[Segment]:
    """`system USER: question ASSISTANT: answer</s>USER: …` (Vicuna v1)."""
    human, assistant = frame.roles
    if frame.system.text:
        yield frame.system
        yield _markup(" ")
    asks, answers = _markup(f"{human}: "), _markup(f" {assistant}:")
    end = _markup(frame.end, supervised=True)
    for question, answer in exchanges:
        yield asks
        yield Segment(question)
        yield answers
        if answer is not None:
            yield Segment(f" {answer}", supervised=True)
            yield end


def hashes(frame: Frame, exchanges: Sequence[Exchange]) -> Iterator[Segment]:
    """`system###Human: question###Assistant: answer###` (Vicuna v0, as it is asked)."""
    human, assistant = frame.roles
    if frame.system.text:
        yield frame.system
        yield _markup("###")
    for number, exchange in enumerate([*frame.example, *exchanges]):
        yield _markup(f"{human}: ")
        yield Segment(exchange.question)
        yield _markup(f"###{assistant}:")
        if exchange.answer is not None:
            # the example exchange is part of the prompt, and the same in every sample
            supervised = number >= len(frame.example)
            yield Segment(f" {exchange.answer}", supervised)
            yield _markup("###", supervised)


def hashes_on_lines(frame: Frame, exchanges: Sequence[Exchange]) -> Iterator[Segment]:
    """`system\\n\\n### Human: question\\n### Assistant: answer\\n### ` (v0, as it is trained).

    All `###` are supervised, and so are the assistant's turns with their role, as in the original.
    """
    human, assistant = frame.roles
    if frame.system.text:
        yield frame.system
        yield _markup("\n\n")
    for exchange in exchanges:
        # the model ends its answers by writing `###`,
        # so that it has to learn it, before human turns too
        yield _markup("###", supervised=True)
        yield _markup(f" {human}: ")
        yield Segment(exchange.question)
        yield _markup("\n")
        if exchange.answer is None:
            yield _markup(f"### {assistant}:")
            return
        yield _markup(f"### {assistant}: ", supervised=True)
        yield Segment(exchange.answer, supervised=True)
        yield _markup("\n", supervised=True)
    yield _markup("### ", supervised=True)


def instructions(frame: Frame, exchanges: Sequence[Exchange]) -> Iterator[Segment]:
    """`[INST] question [/INST] answer </s><s>[INST] …` (Llama 2 and Mistral)."""
    for number, exchange in enumerate(exchanges):
        yield _markup(f"{frame.begin}[INST] " if number else "[INST] ")
        # within the first question, as Llama 2 has no turn for it
        if frame.system.text and not number:
            yield _markup("<<SYS>>\n")
            yield frame.system
            yield _markup("\n<</SYS>>\n\n")
        yield Segment(exchange.question)
        yield _markup(" [/INST]")
        if exchange.answer is not None:
            yield Segment(f" {exchange.answer} ", supervised=True)
            yield _markup(frame.end, supervised=True)


def chatml(frame: Frame, exchanges: Sequence[Exchange]) -> Iterator[Segment]:
    """`<|im_start|>user\\nquestion<|im_end|><|im_start|>assistant\\nanswer<|im_end|>`.

    Without newlines between the turns, as in the original; models that were trained with newlines
    need `chat-template`.
    """
    human, assistant = frame.roles
    if frame.system.text:
        yield _markup("<|im_start|>system\n")
        yield frame.system
        yield _markup("<|im_end|>")
    for exchange in exchanges:
        yield _markup(f"<|im_start|>{human}\n")
        yield Segment(exchange.question)
        yield _markup(f"<|im_end|><|im_start|>{assistant}\n")
        if exchange.answer is not None:
            yield Segment(exchange.answer, supervised=True)
            yield _markup("<|im_end|>", supervised=True)


@lru_cache(maxsize=256)  # every sample has the same
def _markup(text: str, supervised: bool = False) -> Segment:
    return Segment(text, supervised, markup=True)
