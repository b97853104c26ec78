"""Writes prompts without the template's code, from what the export found out about the template.

A question stands between `head` and `ask`. An image is written as `image`; one that is moved to the
front has a newline behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from llavakit.contracts.data import IMAGE, Turn
from llavakit.contracts.errors import ModelError
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
    beginning: tuple[Annotated[int, Field(ge=0, lt=1 << 24)], ...]
    """Ids that the model's own tokenizer puts before a text, also before a raw prompt."""
    between: tuple[str, str] | None
    """The text between a question and its answer, and the text between that answer and the next
    question; None if the template writes later turns in another way."""
    trims_answers: bool = False
    """Whether spaces around an answer are removed."""
    system: tuple[str, str] | None = None
    """`head` in front of a conversation's system text and behind it; None if it takes none."""
    bare: str | None = None
    """`head` without a system text."""
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
            # the same steps as `templates.placement`:
            # an exported folder is read without the templates' code
            words = text.replace(IMAGE, "").strip()
            return "\n".join([*[self.image] * count, *([words] if words else [])])
        return (text.strip() if self.trims else text).replace(IMAGE, self.image)

    def pieces(self, turns: Sequence[Turn], system: str | None = None) -> Iterator[Segment]:
        """Yield a conversation that ends with a question, up to where the answer begins.

        Raises ModelError for earlier turns or a system text that this form has no place for.
        """
        if len(turns) > 1 and self.between is None:
            raise ModelError(_REFUSAL.format(self.template, "earlier turns"))
        yield from self._head(system)
        ask, following = self.between or (self.ask, "")
        for number, turn in enumerate(turns):
            if turn.role == "human":
                yield Segment(self.question(turn.text))
                yield Segment(self.ask if number + 1 == len(turns) else ask, markup=True)
            else:
                answer = turn.text.strip() if self.trims_answers else turn.text
                yield Segment(answer, supervised=True)  # `<image>` in an answer is a text
                yield Segment(following, markup=True)

    def _head(self, system: str | None) -> Iterator[Segment]:
        if system and self.system is not None:
            yield Segment(self.system[0], markup=True)
            yield Segment(system)
            yield Segment(self.system[1], markup=True)
        elif system == "" and self.bare is not None:
            yield Segment(self.bare, markup=True)
        elif system is None or not self.shows_question:
            yield Segment(self.head, markup=True)
        else:
            raise ModelError(_REFUSAL.format(self.template, "a system text"))


_REFUSAL = (
    "the exported folder does not say how its prompt template `{}` writes {}; export the model "
    "again, or ask it without"
)
