"""Reads LLaVA's question files: one `{"question_id", "image", "text", "category"}` per line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path

from llavakit import DataError, Question, Video, Visuals, and_more
from llavakit.contracts.data import IMAGE
from llavakit_plugins.datasets.image_files import inside
from llavakit_plugins.datasets.rows import Row, by_id, id_of, listed, read_rows, text_of


@dataclass(frozen=True)
class QuestionRow:
    """One row of a question file, and the question made from it."""

    question: Question
    row: Row
    where: str
    """File and line, for errors."""


def read_questions(path: Path, images: Path | None, limit: int | None = None) -> list[QuestionRow]:
    """Return the first `limit` questions of a file, or all, in the file's order.

    `image` is a file's name below `images` (by default the folder of the question file), a list of
    names, or absent. Raises DataError for rows that are no questions, ids that occur twice, and
    missing images.
    """
    rows = read_rows(path)
    # called for its errors: two questions with one id would share an answer
    by_id(rows, path)
    if not rows:
        raise DataError(f"{path} holds no questions; choose another file")
    folder = path.parent if images is None else images
    # ids are checked in the whole file, images only of the questions that are asked
    items = [question_row(row, where, folder) for where, row in rows[:limit]]
    missing = [
        f"{image} (question `{item.question.id}`)"
        for item in items
        for image in item.question.images
        if isinstance(image, Path) and not isfile(image)  # no name of a file may be too long
    ]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} images are missing: {and_more(missing)}; check the images "
            "folder"
        )
    return items


def with_suffix(items: Sequence[QuestionRow], suffix: str) -> list[Question]:
    """Return the questions, each with `suffix` as a last line that says how to answer."""
    if not suffix:
        return [item.question for item in items]
    return [replace(q.question, prompt=f"{q.question.prompt}\n{suffix}") for q in items]


def join(items: Sequence[QuestionRow], found: dict[str, tuple[str, Row]], path: Path) -> list[Row]:
    """Return the row of `path` for each question. Raises DataError, naming questions without."""
    missing = [item.question.id for item in items if str(item.question.id) not in found]
    if missing:
        raise DataError(f"{path} has no row for question {listed(missing)}; add it")
    return [found[str(item.question.id)][1] for item in items]


def _names(row: Row, key: str, where: str) -> list[str]:
    names = row.get(key) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: `{key}` is a file's name, or a list of them, got {names!r:.80}")
    return names


def question_row(row: Row, where: str, folder: Path) -> QuestionRow:
    """Return the question in a row of LLaVA's format. Raises DataError where it is none."""
    identity = id_of(row, where)
    given = [inside(folder, name, where) for name in _names(row, "image", where)]
    videos = [inside(folder, name, where, "video") for name in _names(row, "video", where)]
    visuals = Visuals((*given, *map(Video, videos)), where)
    prompt = visuals.place(text_of(row, "text", where))
    images = visuals.all
    marks = prompt.count(IMAGE)
    if marks not in (0, len(images)):
        raise DataError(f"{where}: {len(images)} images for {marks} `{IMAGE}` in the text; fix it")
    category = str(row.get("category") or "")
    return QuestionRow(Question(identity, prompt.strip(), images, "", category), row, where)
