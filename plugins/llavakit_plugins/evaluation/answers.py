"""Reads files of answers: LLaVA's own with a row per answer, or objects of id and text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit import DataError
from llavakit_plugins.datasets.rows import by_id, first_line, read_json, read_rows, text_of

_ROW_IDS = {"question_id", "id"}


@dataclass(frozen=True)
class Answers:
    """Answers by question id, as text."""

    texts: Mapping[str, str]
    stored: Mapping[str, int] | None = None
    """The choices that the file's author read from the answers, if the file stores them."""


def read_answers(path: Path) -> Answers:
    """Return the answers of a file by their ids; the order of lines does not matter.

    Accepted are JSON Lines or a JSON list of `{"question_id", "text"}`, and a JSON object: either
    `{"outputs": {id: text}}`, with or without choices under `predicted` or `results`, or `{id:
    text}` alone. Raises DataError for an id that occurs twice and for a row that is no answer.
    """
    head = first_line(path)
    # the first line decides, as both forms begin with `{`: a row of JSON Lines has an id in it
    if head.startswith("{") and not _is_row(head):
        return _from_object(read_json(path), path)
    rows = by_id(read_rows(path), path)
    if not rows:
        raise DataError(f"{path} holds no answers; choose another file")
    return Answers({name: text_of(row, "text", where) for name, (where, row) in rows.items()})


def _is_row(line: str) -> bool:
    with suppress(ValueError, RecursionError):  # the reader of the whole file reports the fault
        row = json.loads(line)
        return isinstance(row, dict) and bool(_ROW_IDS & set(row))
    return False


def _from_object(table: Any, path: Path) -> Answers:
    texts = table.get("outputs", table)
    if not isinstance(texts, dict) or not texts:
        raise DataError(f"{path} holds no answers; `outputs` is an object of id and text")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{path}: answer `{name}` is no text but {text!r:.60}; fix it")
    # `results` is what the original's eval_science_qa.py writes;
    # the published answers of GPT-3 have `predicted`
    stored = table.get("predicted", table.get("results")) if texts is not table else None
    if stored is not None and not (
        isinstance(stored, dict) and all(isinstance(value, int) for value in stored.values())
    ):
        raise DataError(f"{path}: the stored choices are no object of id and number; remove them")
    return Answers(texts, stored)
