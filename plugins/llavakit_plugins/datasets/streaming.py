"""Reads the rows of a JSON list or of JSON Lines one at a time; files may exceed the memory.

Each row comes with its offset in the file, so that it can be read again alone.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import finalize

from llavakit import DataError
from llavakit_plugins.datasets.json_stream import BLOCK, Row, read_lines, read_list
from llavakit_plugins.datasets.offsets import open_file, read_at

LINES = (".jsonl", ".ndjson")
"""Names of files with one JSON object a line end so; any other file is one JSON list."""


def read_rows(path: Path, block: int = BLOCK) -> Iterator[Row]:
    """Yield the rows of a file in order; `block` bytes of a list are read at once, or a row.

    Raises DataError, with line and column, where the file is broken.
    """
    empty = True
    lines = path.suffix.lower() in LINES
    for row in read_lines(path) if lines else read_list(path, block):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path} holds no samples; choose another file")


def count_rows(path: Path, key: str) -> int:
    """Return how many rows of a file have this key, without parsing: at the disk's speed.

    (Within a text the quotes around such a word would be escaped.)
    """
    word = f'"{key}"'.encode()
    count, tail = 0, b""
    with path.open("rb") as file:
        while block := file.read(BLOCK * 8):
            count += (tail + block).count(word)
            tail = block[-len(word) + 1 :]  # too short to hold the word again
    return count


class StoredRows:
    """Rows that stay in their file; each is read on access. Can be pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # 12 bytes a row: a million rows take 12 MB, where their objects would take gigabytes
        self._starts, self._lengths = array("q"), array("i")
        self._file: int | None = None

    def append(self, row: Row) -> None:
        """Remember where a row lies."""
        self._starts.append(row.start)
        self._lengths.append(row.length)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Read a row. Raises DataError where the file is no longer what it was."""
        start, length = self._starts[index], self._lengths[index]
        try:
            if self._file is None:
                self._file = open_file(self.path)
                finalize(self, os.close, self._file)
            value = json.loads(read_at(self._file, length, start).decode("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"row {index + 1} of {self.path} cannot be read again ({error}); the file must "
                "stay as it is while it is in use"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{self.path} was changed while it was in use; run again")
        return value

    def __getstate__(self) -> dict[str, Any]:
        # a handle belongs to its process: a worker opens the file itself
        return {**self.__dict__, "_file": None}
