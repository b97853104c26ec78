"""Questions of a data set; an answer is right if it equals the data's answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from llavakit import Benchmark, Build, Dataset, Options, Question, Score, Use
from llavakit.contracts.data import IMAGE


class ExactMatchOptions(Options):
    """Options of `exact-match`."""

    data: Use[Dataset]
    limit: int | None = Field(default=None, ge=1)
    """Use only this many questions, drawn with `seed`."""
    seed: int = 0


class ExactMatch(Benchmark):
    """Asks every question of every conversation alone, so that no earlier answer helps.

    Case, spaces and a full stop at the end are ignored.
    """

    name = "exact-match"
    Options = ExactMatchOptions

    def __init__(self, options: ExactMatchOptions, *, build: Build) -> None:
        self.options = options
        self.data = build(options.data)

    def questions(self) -> Sequence[Question]:
        found = []
        for sample in self.data:
            # not strict: a last question without an answer cannot be scored and is left out
            pairs = zip(sample.turns[::2], sample.turns[1::2], strict=False)
            for number, (human, gpt) in enumerate(pairs, start=1):
                prompt = human.text.replace(IMAGE, "").strip()
                identity = f"{sample.id}/{number}"
                found.append(Question(identity, prompt, sample.images, gpt.text, sample.kind))
        if self.options.limit is not None and self.options.limit < len(found):
            draw = np.random.default_rng(self.options.seed)
            chosen = draw.choice(len(found), self.options.limit, replace=False)
            # sorted, so that a limit changes which questions are asked and not their order
            found = [found[index] for index in sorted(chosen.tolist())]
        return found

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        right = [
            _plain(question.truth) == _plain(answer)
            for question, answer in zip(questions, answers, strict=True)
        ]
        return Score({"accuracy": sum(right) / max(1, len(right))}, right)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()
