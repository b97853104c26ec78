"""POPE (arXiv 2305.10355): "Is there a dog in the image?" It measures object hallucination."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from llavakit import Benchmark, DataError, InputPath, Options, Question, Score
from llavakit.contracts.sections import Table
from llavakit_plugins.datasets.rows import Row, id_of, read_rows
from llavakit_plugins.evaluation.questions import QuestionRow, read_questions, with_suffix

_WORD = re.compile(r"[a-z']+")
_ENDS = re.compile(r"[.!?\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # also every kind of line end
_NO = {"no", "not"}
_YES = {"yes"}


class PopeOptions(Options):
    """Options of `pope`."""

    questions: InputPath
    """One `{"question_id", "image", "text", "category"}` per line, with or without `label`."""
    labels: InputPath | None = None
    """A folder with `coco_pope_CATEGORY.json`, or one file, if the questions have no label."""
    images: InputPath | None = None
    """The folder of the images; by default the folder of the question file."""
    suffix: str = ""
    """A last line for every question, such as a request for one word."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many questions from the start."""
    reading: Literal["strict", "original"] = "strict"
    """The rule by which an answer is read: ours (`strict`), or the one of the original's code, with
    which published figures were computed. The figures of both are shown."""


@dataclass(frozen=True)
class Confusion:
    """How often answers were yes and no, rightly and wrongly; "yes" is the positive class."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int
    silent: int
    """Number of answers that say neither; each counts as wrong."""
    positives: int
    """Number of questions whose right answer is yes."""

    @classmethod
    def of(cls, truths: Sequence[bool], said: Sequence[bool | None]) -> Confusion:
        """Count answers; True means yes, False no, None neither."""
        pairs = list(zip(truths, said, strict=True))
        return cls(
            true_positive=pairs.count((True, True)),
            false_positive=pairs.count((False, True)),
            true_negative=pairs.count((False, False)),
            false_negative=pairs.count((True, False)),
            silent=list(said).count(None),
            positives=list(truths).count(True),
        )

    def metrics(self) -> dict[str, float]:
        """Return accuracy, precision, recall, F1 and the share of yes; 0 where undefined."""
        tp, fp, tn, fn, silent, positives = astuple(self)
        total = tp + fp + tn + fn + silent
        precision = tp / (tp + fp) if tp + fp else 0.0
        # over all positive questions: tp + fn would leave out those that were not answered
        recall = tp / positives if positives else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        return {
            "accuracy": (tp + tn) / total,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "yes_ratio": (tp + fp) / total,
        }


class Pope(Benchmark):
    """Yes-or-no questions about objects, by category: random, popular, adversarial.

    An answer has to say either yes or no in its first sentence, which ends at `.`, `!`, `?` or the
    end of the line; otherwise it is wrong. The original's code reads every answer without "no",
    "No" or "not" before the first `.` as yes; its figures are shown beside ours.
    """

    name = "pope"
    Options = PopeOptions

    def __init__(self, options: PopeOptions) -> None:
        self.reading = options.reading
        question_rows = read_questions(options.questions, options.images, options.limit)
        labels = _Labels(options.labels) if options.labels else None
        plain = with_suffix(question_rows, options.suffix)
        self.found = [
            replace(question, truth=_label(item, labels))
            for item, question in zip(question_rows, plain, strict=True)
        ]

    def questions(self) -> Sequence[Question]:
        return self.found

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        truths = [question.truth == "yes" for question in questions]
        read = {name: [reader(answer) for answer in answers] for name, reader in _READERS.items()}
        strict, original, chosen = read["strict"], read["original"], read[self.reading]
        differ = sum(a != b for a, b in zip(strict, original, strict=True))
        metrics = Confusion.of(truths, chosen).metrics()
        metrics |= {
            f"original_{name}": value
            for name, value in Confusion.of(truths, original).metrics().items()
        }
        metrics |= {"silent": float(strict.count(None)), "read_differently": float(differ)}
        rows: list[list[str | float | int | None]] = []
        categories = dict.fromkeys(q.category for q in questions if q.category)
        for category in (*categories, "all"):
            own = [i for i, q in enumerate(questions) if category in ("all", q.category)]
            for reading, said in read.items():
                counts = Confusion.of([truths[i] for i in own], [said[i] for i in own])
                figures = [round(100 * value, 2) for value in counts.metrics().values()]
                rows.append([category, reading, len(own), *astuple(counts), *figures])
                if category == "all" or reading != self.reading:
                    continue
                metrics[f"f1_{category}"] = counts.metrics()["f1"]
        table = Table(
            title="POPE",
            columns=[
                *("category", "reading", "questions", "TP", "FP", "TN", "FN", "neither", "objects"),
                *("accuracy, %", "precision, %", "recall, %", "F1, %", "yes, %"),
            ],
            rows=rows,
            caption=f"{differ} of {len(answers)} answers are read differently by the original.",
        )
        right = [a == b for a, b in zip(truths, chosen, strict=True)]
        return Score(metrics, right, [table])


def strict_answer(text: str) -> bool | None:
    """Return True if the first sentence says yes, False for no, None for neither or both."""
    sentences = _ENDS.split(text.lower())
    # an answer may begin with an empty line or with `1.`: take the first part with a letter
    first = next((part for part in sentences if any(map(str.isalpha, part))), "")
    said = set(_WORD.findall(first))
    yes, no = bool(said & _YES), bool(said & _NO)
    return yes if yes != no else None


def original_answer(text: str) -> bool:
    """Return how POPE's own parser reads an answer: all without "No", "not" or "no" are yes."""
    # kept word for word in what it does:
    # a comma is removed, an exclamation mark is not, and so `No!` is read as yes
    return not {"No", "not", "no"} & set(text.split(".")[0].replace(",", "").split(" "))


_READERS: dict[str, Callable[[str], bool | None]] = {
    "strict": strict_answer,
    "original": original_answer,
}


class _Labels:
    """Labels of a folder or a file, looked up by image and question, or else by question id.

    POPE's files number the questions of each category from 1, so ids alone are not unique.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[Path, dict[tuple[str, ...], str]] = {}

    def find(self, item: QuestionRow) -> str:
        """Return the label of a question. Raises DataError if there is none."""
        path = self._path
        if path.is_dir():
            path = path / f"coco_pope_{item.question.category}.json"
        if path not in self._files:
            self._files[path] = _read_labels(path)
        labels, identity = self._files[path], str(item.question.id)
        # by image and text first: an id of another
        # numbering would find the label of another question
        for key in (_about(item.row), (identity,)):
            if key in labels:
                return labels[key]
        raise DataError(
            f"{path} has no label for question `{identity}` ({item.where}), neither by image and "
            "text nor by id; add it"
        )


def _read_labels(path: Path) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    for where, row in read_rows(path):
        key = _about(row) or (str(id_of(row, where)),)
        label = _yes_or_no(row, where)
        if found.setdefault(key, label) != label:
            raise DataError(f"{where}: {' '.join(key)} has both labels; keep the right one")
    return found


def _about(row: Row) -> tuple[str, ...]:
    """Return image and question, without lines that say how to answer; () if one is missing."""
    image, text = row.get("image"), row.get("text")
    if not isinstance(image, str) or not isinstance(text, str):
        return ()
    return (image, text.strip().partition("\n")[0].strip())


def _label(item: QuestionRow, labels: _Labels | None) -> str:
    if labels is not None:
        return labels.find(item)
    if "label" not in item.row:
        raise DataError(f"{item.where} has no `label`; add it, or state `labels`")
    return _yes_or_no(item.row, item.where)


def _yes_or_no(row: Row, where: str) -> str:
    label = str(row.get("label")).strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{where}: `label` is yes or no, got {row.get('label')!r:.40}")
    return label
