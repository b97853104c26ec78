"""Scores files of a judge's reviews: those that `llava-bench` writes, and published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import Field

from llavakit import DataError, InputPath, Options
from llavakit.contracts.sections import Table
from llavakit_plugins.datasets.rows import Row, id_of, listed, read_rows
from llavakit_plugins.evaluation.file_scores import FileScore, FileScorer
from llavakit_plugins.evaluation.reviews import (
    HIGHEST,
    RELATIVE_COLUMNS,
    Pair,
    Reading,
    Scores,
    mean_pair,
    read_scores,
    relative_rows,
    summarise,
    unswapped,
)


class ReviewFilesOptions(Options):
    """Options of `score reviews`."""

    file: InputPath = Field(description="reviews, one JSON object a line")
    reading: Reading = Field(
        default="first-line",
        description="tolerant: read scores behind empty lines, in bold or out of 10, too",
    )


class ReviewFiles(FileScorer):
    """Scores a judge's reviews: the second answer in percent of the first, which is the reference.

    A review has its text under `content` (LLaVA) or `text` (Vicuna), and often scores under `tuple`
    or `score`. Results of both are shown. Reviews without two scores are counted and left out.
    """

    name = "reviews"
    Options = ReviewFilesOptions
    positional = ("file",)

    def __init__(self, options: ReviewFilesOptions) -> None:
        self.options = options

    def score(self) -> FileScore:
        path = self.options.file
        rows = read_rows(path)
        if not rows:
            raise DataError(f"{path} holds no reviews; choose another file")
        groups: dict[str, dict[bool, tuple[str, Row]]] = {}
        for where, row in rows:
            ways = groups.setdefault(str(id_of(row, where, ("question_id",))), {})
            swapped = row.get("swapped") is True
            if swapped in ways:
                raise DataError(
                    f"{where}: question `{row['question_id']}` is reviewed more than once in the "
                    "same order; keep one review of each"
                )
            ways[swapped] = (where, row)
        categories = {
            name: str(row.get("category") or "")
            for name, ways in groups.items()
            for _, row in ways.values()
        }
        text = {
            name: mean_pair(_from_text(*way, self.options.reading) for way in ways.values())
            for name, ways in groups.items()
        }
        readings: dict[str, Scores] = {"text": text}
        notes: list[str] = []
        bare = [where for where, row in rows if not _has_scores(row)]
        # a mean over some of the reviews would not be comparable with one over all
        if bare and len(bare) < len(rows):
            notes.append(
                f"{len(bare)} of {len(rows)} reviews store no scores ({listed(bare)}): what the "
                "others store is left aside"
            )
        elif not bare:
            stored = {
                name: mean_pair(_from_stored(*way) for way in ways.values())
                for name, ways in groups.items()
            }
            readings = {"stored": stored, "text": text}
        return self._result(len(rows), readings, categories, notes)

    def _result(
        self,
        reviews: int,
        readings: Mapping[str, Scores],
        categories: Mapping[str, str],
        notes: list[str],
    ) -> FileScore:
        shown: dict[str, Any] = {}
        lines: list[list[str | float | int | None]] = []
        for name, scores in readings.items():
            results, unparsed = summarise(scores, categories)
            whole = results.get("all")
            where = "as text" if name == "text" else "as stored"
            if whole is None:
                if len(unparsed) < len(scores):
                    raise DataError(
                        f"{self.options.file}: the reference's scores ({where}) are all 0, so "
                        "nothing can be put in percent of them; fix the file"
                    )
                if name == "text" and shown:  # the stored scores are enough
                    notes.append("no review has two scores as text: only those stored count")
                    continue
                raise DataError(
                    f"{self.options.file}: no review has two scores {where}; choose another file"
                )
            shown[name] = {
                **asdict(whole),
                "unparsed": unparsed,
                "categories": {c: asdict(r) for c, r in results.items() if c != "all"},
            }
            lines += [[name, *line] for line in relative_rows(results)]
            if unparsed:
                notes.append(
                    f"{len(unparsed)} of {len(scores)} reviews have no two scores {where} "
                    f"({listed(unparsed)}): they count nowhere"
                )
        if "stored" in readings:
            pairs = {n: (readings["stored"][n], readings["text"][n]) for n in readings["text"]}
            other = [n for n, (kept, read) in pairs.items() if read is not None and kept != read]
            shown["stored"]["disagree"] = other
            if other:
                notes.append(f"stored scores of {listed(other)} are not those in the text")
        # stored scores come first where there are some: published figures were computed from them
        used = next(iter(readings))
        data = {
            "reviews": reviews,
            "questions": len(readings["text"]),
            "relative": shown[used]["relative"],
            "scores": used,
            **shown,
        }
        table = Table(
            title=f"Relative score, {reviews} reviews of {self.options.file}",
            columns=["scores", *RELATIVE_COLUMNS],
            rows=lines,
        )
        return FileScore(data, [table], notes)


def _has_scores(row: Row) -> bool:
    return "tuple" in row or "score" in row


def _from_text(where: str, row: Row, reading: Reading) -> Pair | None:
    text = row.get("content", row.get("text"))
    if not isinstance(text, str):
        raise DataError(f"{where}: a review needs `content` or `text`, got {text!r:.60}")
    return unswapped(read_scores(text, reading), row)


def _from_stored(where: str, row: Row) -> Pair | None:
    """Return the stored scores; the original writes -1 for scores that it could not read."""
    value = row.get("tuple", row.get("score"))
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(map(_is_score, value))):
        raise DataError(f"{where}: stored scores are two numbers up to 10, got {value!r:.60}")
    first, second = map(float, value)
    return unswapped((first, second), row) if min(first, second) >= 0 else None


def _is_score(value: object) -> bool:
    """Return whether a value is a possible score, or -1, which stands for none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= HIGHEST
