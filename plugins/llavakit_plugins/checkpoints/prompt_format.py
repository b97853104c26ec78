"""Writes prompts without the template's code, from what the export found out about the template.

A question stands between `head` and `ask`. An image is written as `image`; one that is moved to the
front has a newline behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llavakit.contracts.data import IMAGE
from llavakit.contracts.interfaces import Segment


class PromptFormat(BaseModel):
    """The prompt of one question in the form that the model was trained with."""

    model_config = ConfigDict(frozen=True)

    template: str
    """Name of the prompt template that it was derived from."""
    head: str
    ask: str
    image: str
    """The text for an image; contains `<image>`."""
    placement: Literal["front", "keep"]
    shows_question: bool
    """False for the template `plain`, whose prompts hold images only."""
    trims: bool
    """Whether spaces around a question without images are removed."""
    adds_bos: bool
    """Whether `beginning` is put first; otherwise the template writes it."""
    beginning: tuple[int, ...]
    """Ids that the model's own tokenizer puts before a text, also before a raw prompt."""
    between: tuple[str, str] | None
    """The text between a question and its answer, and the text between that answer and the next
    question; None if the template writes later turns in another way."""
    stops: tuple[str, ...]
    """Texts that end an answer, besides the end tokens."""
    end: str = ""
    """The text behind the last answer of a whole conversation."""

    def question(self, text: str) -> str:
        """Return a question as the template writes it, with its images."""
        count = text.count(IMAGE)
        if not self.shows_question:
            return self.image * count
        if count and self.placement == "front":
            words = text.replace(IMAGE, "").strip()
            return "\n".join([*[self.image] * count, *([words] if words else [])])
        return (text.strip() if self.trims else text).replace(IMAGE, self.image)

    def pieces(self, text: str) -> Sequence[Segment]:
        """Return the prompt of one question, up to where the answer begins."""
        return [
            Segment(self.head, markup=True),
            Segment(self.question(text)),
            Segment(self.ask, markup=True),
        ]
