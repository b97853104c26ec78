"""Prompts without a template's code: what the export found out about the model's template.

A question stands between `head` and `ask`. Images are written as `image`, with a newline behind
each one that is moved to the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llavakit.contracts.data import IMAGE
from llavakit.contracts.interfaces import Segment


class PromptFormat(BaseModel):
    """One question, as the model was tuned to be asked it."""

    model_config = ConfigDict(frozen=True)

    template: str
    """The name of the template it was taken from."""
    head: str
    ask: str
    image: str
    """What stands for an image; has `<image>` in it."""
    placement: Literal["front", "keep"]
    shows_question: bool
    """False for `plain`, which shows images only."""
    trims: bool
    """Whether space around a question without images is cut off."""
    adds_bos: bool
    """Whether `beginning` goes in front; else the template writes it."""
    beginning: tuple[int, ...]
    """What the model's own tokenizer puts in front of a text, as it does of a raw prompt."""
    between: tuple[str, str] | None
    """Between a question and its answer, and between that and the next question; None where the
    template writes later turns in another way."""
    stops: tuple[str, ...]
    """Texts besides the end tokens that end an answer."""

    def question(self, text: str) -> str:
        """Return a question as the template writes it, images included."""
        count = text.count(IMAGE)
        if not self.shows_question:
            return self.image * count
        if count and self.placement == "front":
            words = text.replace(IMAGE, "").strip()
            return "\n".join([*[self.image] * count, *([words] if words else [])])
        return (text.strip() if self.trims else text).replace(IMAGE, self.image)

    def pieces(self, text: str) -> Sequence[Segment]:
        """Return the prompt for one question, open for the answer."""
        return [
            Segment(self.head, markup=True),
            Segment(self.question(text)),
            Segment(self.ask, markup=True),
        ]
