"""Preferences as training reads them: two samples each, of which the last answer is supervised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llavakit import Dataset, PromptTemplate, Segment, Turn, Use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def both_answers(data: Use[Dataset]) -> Use[Dataset]:
    """Return the choice of a data set that has each sample of `data` with either answer."""
    stated = data.model_dump(mode="json")
    return Use[Dataset].model_validate({"use": "answer-pairs", "data": stated})


class LastAnswer(PromptTemplate):
    """Another template's text, of which only the last answer is supervised."""

    def __init__(self, template: PromptTemplate) -> None:
        self._template = template
        self.name = template.name  # type: ignore[misc]
        self.adds_bos = template.adds_bos  # type: ignore[misc]
        # what tells one from another, where what was tokenised is looked up
        kind, options = type(template), getattr(template, "options", None)
        self.options = f"{kind.__module__}:{kind.__qualname__} {options!r}"

    def segments(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Segment]:
        found = [one for one in self._template.segments(turns, tokenizer) if one.text]
        supervised = [number for number, one in enumerate(found) if one.supervised]
        begin = supervised[-1] if supervised else 0
        # an answer and the end behind it may be segments of their own
        while begin and found[begin - 1].supervised:
            begin -= 1
        return [one._replace(supervised=False) for one in found[:begin]] + found[begin:]

    def with_system(self, system: str) -> PromptTemplate:
        return LastAnswer(self._template.with_system(system))

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        return self._template.stop(tokenizer)
