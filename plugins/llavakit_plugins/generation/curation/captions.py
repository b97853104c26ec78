"""Files of captions by the million, read row by row: LLaVA's JSON, JSON lines, or CC3M's TSV."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit import DataError

_FIRST = 1 << 12


@dataclass(frozen=True)
class CaptionRow:
    """One caption, and the row it stands in."""

    caption: str
    row: dict[str, Any]


def read_captions(path: Path) -> Iterator[CaptionRow]:
    """Yield the rows of a file, whose content says what it is.

    A JSON list has LLaVA's samples, whose last answer is the caption; JSON lines have `caption`
    (and mostly `id` and `image`); lines of a caption, a tab and a URL are CC3M's.
    Raises DataError naming the row that cannot be used.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(_FIRST).lstrip()[:1]
        rows = {b"[": _json_list, b"{": _json_lines}.get(begin, _tab_separated)
        yield from rows(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error


def _json_list(path: Path) -> Iterator[CaptionRow]:
    try:
        import ijson
    except ImportError as error:
        raise DataError(f"reading {path} needs `ijson`: pip install 'llavakit[openai]'") from error
    try:
        with path.open("rb") as file:
            for number, row in enumerate(ijson.items(file, "item", use_float=True), start=1):
                yield CaptionRow(_answer(row, f"{path}: sample {number}"), row)
    except ijson.JSONError as error:
        reason = str(error).partition("\n")[0].rstrip(".")  # a picture of the place follows
        raise DataError(f"{path} is not valid JSON: {reason}; fetch it again") from error


def _answer(row: Any, where: str) -> str:
    try:
        turns = row["conversations"]
        (*_, last) = [turn["value"] for turn in turns if turn["from"] == "gpt"]
        return str(last)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} has no answer in `conversations`; remove it") from error


def _json_lines(path: Path) -> Iterator[CaptionRow]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                caption = row["caption"]
                if not isinstance(caption, str):
                    raise TypeError("`caption` is no text")
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}:{number} is no JSON object with a `caption` ({error}); mend or remove "
                    "the line"
                ) from error
            yield CaptionRow(caption, row)


def _tab_separated(path: Path) -> Iterator[CaptionRow]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            caption, tab, url = line.rstrip("\n").partition("\t")
            if not tab:
                raise DataError(
                    f"{path}:{number} has no tab; a line is a caption, a tab and a URL, or a JSON "
                    "object"
                )
            yield CaptionRow(caption, {"id": str(number), "caption": caption, "url": url})
