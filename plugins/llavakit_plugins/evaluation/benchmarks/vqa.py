"""Visual question answering with short answers: VQAv2, TextVQA, VizWiz, GQA, or your own file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from llavakit import Benchmark, DataError, InputPath, Options, Question, Score
from llavakit.contracts.sections import Table
from llavakit_plugins.datasets.rows import Row, by_id, read_rows
from llavakit_plugins.evaluation.questions import join, read_questions, with_suffix
from llavakit_plugins.evaluation.vqa_text import normalise, vqa_accuracy


class VqaOptions(Options):
    """Options of `vqa`."""

    questions: InputPath
    """One `{"question_id", "image", "text"}` per line, with `answers` (a list) or `answer`."""
    truths: InputPath | None = None
    """Another file with the answers by `question_id`, if the questions have none."""
    images: InputPath | None = None
    """The folder of the images; by default the folder of the question file."""
    suffix: str = "Answer with a single word or a short phrase."
    """A last line for every question; may be empty."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many questions from the start."""


class Vqa(Benchmark):
    """Compares short answers with those of several people, after VQA's normalisation.

    In VQA accuracy an answer is fully right if three other people give it. In exact match it is
    right if anyone gives it.
    """

    name = "vqa"
    Options = VqaOptions

    def __init__(self, options: VqaOptions) -> None:
        items = read_questions(options.questions, options.images, options.limit)
        rows = [item.row for item in items]
        locations = [item.where for item in items]
        if options.truths is not None:
            # by id, as nothing says that the two files have the same order
            rows = join(items, by_id(read_rows(options.truths), options.truths), options.truths)
            locations = [f"question `{item.question.id}` of {options.truths}" for item in items]
        self.truths = {
            str(item.question.id): _truths(row, where)
            for item, row, where in zip(items, rows, locations, strict=True)
        }
        self.found = [
            replace(question, truth=_commonest(self.truths[str(question.id)]))
            for question in with_suffix(items, options.suffix)
        ]

    def questions(self) -> Sequence[Question]:
        return self.found

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        truths = [self.truths[str(question.id)] for question in questions]
        shares = [vqa_accuracy(a, t) for a, t in zip(answers, truths, strict=True)]
        exact = [
            normalise(a) in {normalise(truth) for truth in t}
            for a, t in zip(answers, truths, strict=True)
        ]
        rows: list[list[str | float | int | None]] = []
        categories = dict.fromkeys(q.category for q in questions if q.category)
        for category in (*categories, "all"):
            own = [i for i, q in enumerate(questions) if category in ("all", q.category)]
            figures = [sum(values[i] for i in own) / len(own) for values in (shares, exact)]
            rows.append([category, len(own), *(round(100 * figure, 2) for figure in figures)])
        table = Table(
            title="Short answers",
            columns=["category", "questions", "VQA accuracy, %", "exact match, %"],
            rows=rows,
        )
        metrics = {"accuracy": sum(shares) / len(shares), "exact_match": sum(exact) / len(exact)}
        return Score(metrics, exact, [table])


def _truths(row: Row, where: str) -> list[str]:
    """Return the answers of a row, which are texts or VQA's objects with `answer`."""
    found = row.get("answers", row.get("answer"))
    found = [found] if isinstance(found, str | int | float) else found
    if not isinstance(found, list) or not found:
        raise DataError(f"{where}: needs `answers`, a list, or `answer`; got {found!r:.60}")
    texts = [item.get("answer") if isinstance(item, dict) else item for item in found]
    if not all(isinstance(text, str | int | float) for text in texts):
        raise DataError(f"{where}: every answer is a text, got {found!r:.60}")
    return [str(text) for text in texts]


def _commonest(truths: Sequence[str]) -> str:
    # for display only; ties go to the first, so that the result does not depend on hashes
    return max(dict.fromkeys(truths), key=list(truths).count)
