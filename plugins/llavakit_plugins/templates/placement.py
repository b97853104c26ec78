"""What every template does to turns first: pair them, and put the images in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from pydantic import field_validator

from llavakit import DataError, Options, Turn
from llavakit.contracts.data import IMAGE

Placement = Literal["front", "keep", "random"]


class TemplateOptions(Options):
    """Options of every template that shows the question."""

    system: str | None = None
    """The text in front of the conversation; the template's own where absent, none where empty."""
    image_placement: Placement = "front"
    """`front`: a question's images go in front of it, each with a newline (the original from v1.0
    on). `keep`: they stay where the data has them. `random`: in front or behind (the paper)."""
    image: str = IMAGE
    """What an image is written as. Special tokens count as such: LLaVA's first models saw
    `<im_start><image><im_end>`."""
    seed: int = 0
    """With the sample's text, it alone decides where `random` puts the images."""

    @field_validator("image")
    @classmethod
    def _has_one(cls, value: str) -> str:
        if value.count(IMAGE) != 1:
            raise ValueError(f"must hold `{IMAGE}` once")
        return value


@dataclass(frozen=True)
class Exchange:
    """A question and its answer; None where the answer is to be written."""

    question: str
    answer: str | None


def exchanges(turns: Sequence[Turn], options: TemplateOptions) -> list[Exchange]:
    """Return the turns as questions with answers, images placed.

    Raises DataError where turns don't alternate from a human one. (The original leaves out a
    leading answer in silence.)
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
    questions = [_place(turns, number, options) for number in range(0, len(turns), 2)]
    answers = [turn.text for turn in turns[1::2]] + [None] * (len(turns) % 2)
    return [Exchange(*pair) for pair in zip(questions, answers, strict=True)]


def _place(turns: Sequence[Turn], number: int, options: TemplateOptions) -> str:
    text = turns[number].text
    if options.image_placement == "keep" or IMAGE not in text:
        return text
    images = [IMAGE] * text.count(IMAGE)
    # the original leaves one placeholder of several, and loses the others' images
    question = text.replace(IMAGE, "").strip()
    words = [question] if question else []
    behind = options.image_placement == "random" and _coin(turns, number, options.seed)
    return "\n".join([*words, *images] if behind else [*images, *words])


def _coin(turns: Sequence[Turn], number: int, seed: int) -> bool:
    """Return the same answer for the same conversation on every machine."""
    digest = blake2b(f"{seed} {number}".encode())
    for turn in turns:
        digest.update(b"\0" + turn.text.encode("utf-8", "surrogatepass"))
    return bool(digest.digest()[0] & 1)
