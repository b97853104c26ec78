"""The first step of every template: pairs turns, and puts images at their positions."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

from pydantic import field_validator

from llavakit import DataError, Options, Turn
from llavakit.contracts.data import IMAGE

Placement = Literal["front", "keep", "random"]


class TemplateOptions(Options):
    """Options of every template that shows the question."""

    system: str | None = None
    """The text before the conversation; by default the template's own; none if it is empty."""
    image_placement: Placement = "front"
    """`front`: a question's images go before it, each with a newline (the original from v1.0 on).
    `keep`: they stay where the data has them. `random`: before or behind it (arXiv 2304.08485)."""
    image: str = IMAGE
    """The text of an image. It may contain special tokens: LLaVA's first models were trained with
    `<im_start><image><im_end>`."""
    seed: int = 0
    """Only this seed and the sample's text decide where `random` puts the images."""

    @field_validator("image")
    @classmethod
    def _has_one(cls, value: str) -> str:
        if value.count(IMAGE) != 1:
            raise ValueError(f"must hold `{IMAGE}` once")
        return value


class Exchange(NamedTuple):
    """A question and its answer; None if the answer is still to be written."""

    question: str
    answer: str | None


def exchanges(turns: Sequence[Turn], options: TemplateOptions) -> list[Exchange]:
    """Return the turns as questions with answers, with images at their positions.

    Raises DataError unless turns alternate and start with a human one. (The original drops a
    leading answer without a message.)
    """
    if not turns:
        raise DataError("there are no turns; give the conversation a question")
    for number, turn in enumerate(turns):
        expected = ("human", "gpt")[number % 2]
        if turn.role != expected:
            raise DataError(
                f"turn {number + 1} is from `{turn.role}`, expected `{expected}`; turns must "
                "alternate and start with the human"
            )
    questions = [_with_images(turns, number, options) for number in range(0, len(turns), 2)]
    answers = [turn.text for turn in turns[1::2]] + [None] * (len(turns) % 2)
    return [Exchange(*pair) for pair in zip(questions, answers, strict=True)]


def _with_images(turns: Sequence[Turn], number: int, options: TemplateOptions) -> str:
    text = turns[number].text
    if options.image_placement == "keep" or IMAGE not in text:
        return text
    images = [IMAGE] * text.count(IMAGE)
    # the original keeps only one placeholder of several, and loses the images of the others
    question = text.replace(IMAGE, "").strip()
    words = [question] if question else []
    behind = options.image_placement == "random" and _coin(turns, number, options.seed)
    return "\n".join([*words, *images] if behind else [*images, *words])


def _coin(turns: Sequence[Turn], number: int, seed: int) -> bool:
    """Return a coin toss that is the same for the same conversation on every machine.

    Python's `hash` is not used, since it differs between processes.
    """
    digest = blake2b(f"{seed} {number}".encode())
    for turn in turns:
        digest.update(b"\0" + turn.text.encode("utf-8", "surrogatepass"))
    return bool(digest.digest()[0] & 1)
