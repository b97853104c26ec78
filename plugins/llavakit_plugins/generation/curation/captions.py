"""Reads files of millions of captions row by row: LLaVA's JSON, JSON Lines, or CC3M's TSV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit import DataError
from llavakit.contracts.data import is_cut
from llavakit_plugins.datasets.json_stream import read_lines, read_list
from llavakit_plugins.datasets.text_files import open_text

_FIRST = 1 << 12  # bytes that are read to recognise a file


@dataclass(frozen=True)
class CaptionRow:
    """One caption and its row."""

    caption: str
    row: dict[str, Any]


def read_captions(path: Path) -> Iterator[CaptionRow]:
    """Yield the rows of a file; its format is recognised by its content.

    A JSON list has LLaVA's samples, whose last answer is the caption. JSON Lines have `caption`
    and usually `id` and `image`. CC3M's lines are a caption, a tab and a URL. Raises DataError,
    which names the row, for a row that cannot be used.
    """
    with open_text(path) as file:
        begin = file.read(_FIRST).lstrip()[:1]
    # by content, as captions are published under all sorts of names
    rows = {b"[": _json_list, b"{": _json_lines}.get(begin, _tab_separated)
    yield from rows(path)


def _json_list(path: Path) -> Iterator[CaptionRow]:
    for number, row in enumerate(read_list(path), start=1):
        yield CaptionRow(_answer(row.value, f"{path}: sample {number}"), row.value)


def _answer(row: Any, where: str) -> str:
    try:
        turns = row["conversations"]
        (*_, last) = [turn["value"] for turn in turns if turn["from"] == "gpt"]
        if not isinstance(last, str):
            raise TypeError(last)
        return _whole(last, where)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} has no answer in `conversations`; remove it") from error


def _json_lines(path: Path) -> Iterator[CaptionRow]:
    for row in read_lines(path):
        where, caption = f"{path}:{row.line}", row.value.get("caption")
        if not isinstance(caption, str):
            raise DataError(f"{where} is no JSON object with a `caption` (text); fix or remove it")
        yield CaptionRow(_whole(caption, where), row.value)


def _tab_separated(path: Path) -> Iterator[CaptionRow]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                caption, tab, url = line.rstrip("\n").partition("\t")
                if not tab:
                    raise DataError(
                        f"{path}:{number} has no tab; a line is a caption, a tab and a URL, or a "
                        "JSON object"
                    )
                # CC3M has no ids: the line's number is the only
                # one that everybody with the file agrees on
                yield CaptionRow(caption, {"id": str(number), "caption": caption, "url": url})
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (behind line {number}); convert it") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _whole(caption: str, where: str) -> str:
    if is_cut(caption):
        raise DataError(f"{where}: the caption has half a character (half an emoji); fix it")
    return caption
