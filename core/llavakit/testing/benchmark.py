"""The contract of a benchmark."""

from __future__ import annotations

import math

from llavakit.contracts.interfaces import Benchmark
from llavakit.model.images import open_image
from llavakit.testing.contract import Contract


class BenchmarkContract(Contract[Benchmark]):
    """Checks a `Benchmark` with a few questions."""

    kind = Benchmark
    metric: str = "accuracy"  #: A figure that is higher for better answers.

    def test_questions_are_whole_and_always_the_same(self) -> None:
        questions = list(self.build().questions())
        assert questions, "build one with questions"
        again = list(self.build().questions())
        assert [(q.id, q.prompt) for q in questions] == [(q.id, q.prompt) for q in again]
        assert len({question.id for question in questions}) == len(questions), "ids recur"
        for question in questions:
            assert question.prompt.strip()
            for image in question.images:
                assert open_image(image, f"question {question.id}").mode == "RGB"

    def test_true_answers_score_higher_than_none(self) -> None:
        benchmark = self.build()
        questions = benchmark.questions()
        best = benchmark.score(questions, [question.truth for question in questions])
        worst = benchmark.score(questions, ["" for _ in questions])
        for score in (best, worst):
            assert len(score.right) == len(questions), "`right` has one entry a question"
            for name, value in score.metrics.items():
                assert math.isfinite(value), f"{name} is {value}"
        assert best.metrics[self.metric] > worst.metrics[self.metric], (
            f"true answers have {self.metric} {best.metrics[self.metric]}, empty ones "
            f"{worst.metrics[self.metric]}"
        )
