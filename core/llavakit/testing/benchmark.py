"""The contract of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llavakit.contracts.data import Question, Score
from llavakit.contracts.interfaces import Benchmark
from llavakit.stream.images import open_image
from llavakit.testing.contract import Contract, hold, holding

_UNREADABLE = ("", "#", "\ufffd ...", "I cannot see an image.")


class BenchmarkContract(Contract[Benchmark]):
    """Checks a `Benchmark` with a few questions; build one whose truths are not all the same."""

    kind = Benchmark
    metric: str = "accuracy"  #: A figure that is higher for better answers.

    def best(self, questions: Sequence[Question]) -> Sequence[str]:
        """Return answers that are as good as can be; by default each question's `truth`."""
        return [question.truth for question in questions]

    def test_questions_are_whole_and_always_the_same(self) -> None:
        questions = list(self.build().questions())
        hold(questions, "at least one question", "none", "build one with questions")
        again = list(self.build().questions())
        first, second = ([(q.id, q.prompt) for q in asked] for asked in (questions, again))
        hold(
            first == second,
            "`questions` gives the same each time, in order", f"{first[:3]}, then {second[:3]}",
            "sort what comes from sets and folders, and seed what is drawn",
        )  # fmt: skip
        ids = [str(question.id) for question in questions]
        recurring = sorted({i for i in ids if ids.count(i) > 1})
        hold(
            not recurring,
            "no two questions have one id: answers are joined by it", f"{recurring[:3]} recur",
            "make ids of what tells the questions apart",
        )  # fmt: skip
        for question in questions:
            hold(
                question.prompt.strip(),
                "a question asks something", f"{question.id}: {question.prompt!r}",
                "fill in `prompt`",
            )  # fmt: skip
            with holding("every image of a question can be opened", "fix `Question.images`"):
                for image in question.images:
                    open_image(image, f"question {question.id}")

    def test_true_answers_score_higher_than_none(self) -> None:
        benchmark = self.build()
        questions = benchmark.questions()
        best = benchmark.score(questions, self.best(questions))
        worst = benchmark.score(questions, ["" for _ in questions])
        for score in (best, worst):
            hold(
                len(score.right) == len(questions),
                "`right` has one entry a question",
                f"{len(score.right)} for {len(questions)} questions", "fix `Score.right`",
            )  # fmt: skip
            for name, value in score.metrics.items():
                hold(
                    math.isfinite(value),
                    "every figure is a number", f"{name} is {value}",
                    "leave a figure out where nothing was counted",
                )  # fmt: skip
            hold(
                self.metric in score.metrics,
                f"a figure `{self.metric}`", sorted(score.metrics),
                "set `metric` to the one that is higher for better answers",
            )  # fmt: skip
        good, bad = best.metrics[self.metric], worst.metrics[self.metric]
        hold(
            good > bad,
            "true answers score higher than empty ones",
            f"{self.metric} is {good} for true answers, {bad} for empty ones", "fix `score`",
        )  # fmt: skip

    def test_an_answer_is_scored_by_its_question_and_not_by_its_position(self) -> None:
        change = (
            "look the truth up by the question that is handed to `score` (its `truth` or `id`), "
            "not by position in what the benchmark itself holds"
        )
        benchmark = self.build()
        questions = list(benchmark.questions())
        answers = list(self.best(questions))
        whole = benchmark.score(questions, answers)
        turned = self.build().score(questions[::-1], answers[::-1])
        self._same(whole, turned, "questions in another order give the same figures", change)
        hold(
            list(turned.right)[::-1] == list(whole.right),
            "`right` follows the order of the questions that are handed over",
            f"{list(turned.right)[:5]} for the questions turned round", change,
        )  # fmt: skip
        for number, question in enumerate(questions):
            alone = self.build().score([question], [answers[number]])
            hold(
                list(alone.right) == [whole.right[number]],
                f"question {question.id} asked alone is as right as among the others",
                f"{list(alone.right)} instead of {[whole.right[number]]}", change,
            )  # fmt: skip

    def test_scoring_twice_gives_the_same(self) -> None:
        benchmark = self.build()
        questions = benchmark.questions()
        true = list(self.best(questions))
        first = benchmark.score(questions, true)
        benchmark.score(questions, [_UNREADABLE[1] for _ in questions])
        again = benchmark.score(questions, true)
        self._same(
            first, again, "what was scored before changes nothing",
            "keep nothing on `self` while scoring: count in local variables",
        )  # fmt: skip

    def test_unreadable_answers_score_the_same_each_time(self) -> None:
        questions = self.build().questions()
        for text in _UNREADABLE:
            answers = [text for _ in questions]
            draws: list[Score] = []
            for _ in range(8):  # a coin gives itself away in 8 throws for each question
                benchmark = self.build()
                draws += [benchmark.score(questions, answers) for _ in range(2)]
            for draw in draws[1:]:
                self._same(
                    draws[0], draw, f"the same answers ({text!r}) give the same figures",
                    "count what cannot be read as wrong, or draw with a generator seeded by the "
                    "question's id",
                )  # fmt: skip

    def _same(self, first: Score, second: Score, promise: str, change: str) -> None:
        for name in {**first.metrics, **second.metrics}:
            one, other = (s.metrics.get(name, math.nan) for s in (first, second))
            hold(
                math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12),
                promise, f"{name} is {one}, then {other}", change,
            )  # fmt: skip
        if promise.startswith("questions in another order"):
            return
        hold(
            list(first.right) == list(second.right),
            promise, f"right is {list(first.right)[:5]}, then {list(second.right)[:5]}", change,
        )  # fmt: skip
