"""Reads the rows of a JSON list, or of JSON lines, one at a time: the file may exceed the memory.

Each row comes with its place in the file, so that it can be read again by itself.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from json.decoder import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from weakref import finalize

from llavakit import DataError

LINES = (".jsonl", ".ndjson")
"""Names of files with one JSON object a line end so; any other file is one JSON list."""
_BLOCK = 1 << 20
_LONGEST_ROW = 1 << 26  # in a file whose end of a text is missing, a row would never end
_SPACE = re.compile(r"[ \t\n\r]*")


class Row(NamedTuple):
    """One object of the file, and where it lies there."""

    value: Mapping[str, Any]
    start: int
    """Its first byte."""
    length: int
    """In bytes."""


def read_rows(path: Path, block: int = _BLOCK) -> Iterator[Row]:
    """Yield the rows of a file in order; `block` bytes of a list are read at once, or a row.

    Raises DataError, with line and column, where the file is broken.
    """
    empty = True
    try:
        with path.open("rb") as file:
            lines = path.suffix in LINES
            for row in _read_lines(file, path) if lines else _read_list(_Window(file, path, block)):
                empty = False
                yield row
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply to read; mend the file") from error
    if empty:
        raise DataError(f"{path} holds no samples; choose another file")


def count_rows(path: Path, key: str) -> int:
    """Return how many rows of a file have this key, without parsing: at the disk's speed.

    (Within a text the quotes around such a word would be escaped.)
    """
    word = f'"{key}"'.encode()
    count, tail = 0, b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK * 8):
            count += (tail + block).count(word)
            tail = block[-len(word) + 1 :]  # too short to hold the word again
    return count


# -- a JSON list -----------------------------------------------------------------------------------


def _read_list(window: _Window) -> Iterator[Row]:
    if window.next_character() != "[":
        window.value()
        if window.next_character():
            raise window.error("Extra data; a file of JSON lines is named .jsonl")
        raise window.no_list()
    window.advance(window.at + 1)
    while (character := window.next_character()) != "]":
        row = window.value()
        if not isinstance(row.value, dict):
            raise window.no_list()
        yield row
        character = window.next_character()
        if character == ",":
            window.advance(window.at + 1)
            if window.next_character() == "]":
                raise window.error("Expecting value")
        elif character != "]":
            raise window.error("Expecting ',' delimiter")
    window.advance(window.at + 1)
    if window.next_character():
        raise window.error("Extra data")


class _Window:
    """The stretch of a text file that is being read."""

    def __init__(self, file: BinaryIO, path: Path, block: int) -> None:
        self._file, self._path, self._block = file, path, block
        self._decode = JSONDecoder().raw_decode
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._read = 0  # bytes
        self.at = 0
        """Where in the window we are."""
        self._byte = 0  # of the file, at that place
        self._line, self._column = 1, 0  # of the window's first character
        if file.read(3) == codecs.BOM_UTF8:
            self._byte = self._read = 3
        else:
            file.seek(0)

    def next_character(self) -> str:
        """Go on to the next character that is no space and return it; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self.at)
            assert found is not None
            self.advance(found.end())
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._fill():
                return ""

    def value(self) -> Row:
        """Read the JSON value that begins here."""
        while True:
            try:
                value, end = self._decode(self._text, self.at)
            except JSONDecodeError as error:
                if self._may_be_cut(error) and self._fill():
                    continue
                raise self.error(error.msg, error.pos) from error
            except ValueError as error:  # a whole number of more digits than Python reads
                raise self.error("a number is too long") from error
            if end == len(self._text) and not isinstance(value, dict | list) and self._fill():
                continue  # a number may go on
            start = self._byte
            self.advance(end)
            return Row(value, start, self._byte - start)

    def advance(self, end: int) -> None:
        """Go on to this place of the window."""
        piece = self._text[self.at : end]
        self._byte += len(piece) if piece.isascii() else len(piece.encode())
        self.at = end

    def error(self, message: str, place: int | None = None) -> DataError:
        """Return the error of a place, by default of this one."""
        line, column = self._position(self.at if place is None else place)
        return DataError(
            f"{self._path}:{line}:{column + 1}: not valid JSON: {message}; mend the file"
        )

    def no_list(self) -> DataError:
        return DataError(
            f"{self._path} is not a list of objects; LLaVA's training JSON is one list"
        )

    def _may_be_cut(self, error: JSONDecodeError) -> bool:
        """Whether the error may only mean that the window ends within the value."""
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16

    def _fill(self) -> bool:
        """Drop what was read, read on; return whether there was more."""
        unread = len(self._text) - self.at
        if unread > _LONGEST_ROW:
            raise self.error(f"a row is longer than {_LONGEST_ROW >> 20} MB (a quote is missing?)")
        block = self._file.read(max(self._block, unread))
        try:
            new = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = self._read + error.start - len(self._decoder.getstate()[0])
            raise DataError(f"{self._path} is not UTF-8 text (byte {place}); convert it") from error
        if not block:
            return False
        self._read += len(block)
        self._line, self._column = self._position(self.at)
        self._text = self._text[self.at :] + new
        self.at = 0
        return True

    def _position(self, place: int) -> tuple[int, int]:
        """Return the line, from 1, and column, from 0, of a place in the window."""
        newlines = self._text.count("\n", 0, place)
        if not newlines:
            return self._line, self._column + place
        return self._line + newlines, place - self._text.rindex("\n", 0, place) - 1


# -- JSON lines ------------------------------------------------------------------------------------


def _read_lines(file: BinaryIO, path: Path) -> Iterator[Row]:
    start = number = 0
    while line := file.readline(_LONGEST_ROW):
        number += 1
        if len(line) == _LONGEST_ROW:
            raise DataError(f"{path}:{number}: the line is longer than {_LONGEST_ROW >> 20} MB")
        if line.strip():
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}:{error.colno}: not valid JSON: {error.msg}; mend the file"
                ) from error
            except UnicodeDecodeError as error:
                place = start + error.start
                raise DataError(f"{path} is not UTF-8 text (byte {place}); convert it") from error
            except ValueError as error:  # a whole number of more digits than Python reads
                raise DataError(f"{path}:{number}: a number is too long; mend the file") from error
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: the line is no JSON object; mend the file")
            yield Row(value, start, len(line))
        start += len(line)


# -- again, by place -------------------------------------------------------------------------------


class StoredRows:
    """Rows that stay in their file, where each is read when it is asked for. Can be pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
                self._file = os.open(self.path, os.O_RDONLY)
                finalize(self, os.close, self._file)
            value = json.loads(os.pread(self._file, length, start).decode("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"row {index + 1} of {self.path} cannot be read again ({error}); the file must "
                "stay as it is while it is in use"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{self.path} was changed while it was in use; run again")
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
