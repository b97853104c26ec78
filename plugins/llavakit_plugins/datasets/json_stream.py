"""Reads JSON one value at a time: lists, a list within an object, and JSON Lines.

Files may be larger than the memory. Each value comes with its byte offset in the file. Python's
`json` reads whole documents only.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from json.decoder import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llavakit import DataError
from llavakit_plugins.datasets.text_files import open_text

BLOCK = 1 << 20
_LONGEST_ROW = 1 << 26  # in a file whose end of a text is missing, a row would never end
_A_LIST = ", or name it .json if it is one JSON list"
_SPACE = re.compile(r"[ \t\n\r]*")


class Row(NamedTuple):
    """One value of a file, and its position in the file."""

    value: Any
    start: int
    """Its first byte."""
    length: int
    """In bytes."""
    doubled: str | None = None
    """A key that an object in it has twice: which of the two counts, nobody could say."""
    line: int = 0
    """Of a file that has one a line, from 1."""


def read_list(path: Path, block: int = BLOCK) -> Iterator[Row]:
    """Yield the objects of a file that is one JSON list; `block` bytes are read at once, or a row.

    Raises DataError, with line and column, where the file is broken.
    """
    with _open(path, block) as window:
        if window.next_character() != "[":
            window.value()
            if window.next_character():
                raise window.error("Extra data; a file of JSON lines is named .jsonl")
            raise _no_list(path)
        for number, row in enumerate(window.items(), start=1):
            if not isinstance(row.value, dict):
                raise _no_list(path, f": row {number:,} on line {window.line} is none")
            yield row
        if window.next_character():
            raise window.error("Extra data")


def read_member(path: Path, name: str, block: int = BLOCK) -> Iterator[Row]:
    """Yield the values of the list `name` of a file that is one JSON object; others are skipped.

    Raises DataError, with line and column, where the file is broken before the list ends.
    """
    with _open(path, block) as window:
        if window.next_character() != "{":
            raise window.error("Expecting '{'")
        empty = True
        while True:
            window.advance(window.at + 1)
            character = window.next_character()
            if character == "}" and empty:
                return
            if character != '"':
                raise window.error("Expecting property name enclosed in double quotes")
            key, empty = window.value().value, False
            if window.next_character() != ":":
                raise window.error("Expecting ':' delimiter")
            window.advance(window.at + 1)
            if window.next_character() == "[":
                for row in window.items():
                    if key == name:
                        yield row
            else:
                window.value()
            if key == name or window.next_character() == "}":
                return
            if window.next_character() != ",":
                raise window.error("Expecting ',' delimiter")


def read_lines(path: Path) -> Iterator[Row]:
    """Yield the objects of a file that has one a line. Raises DataError naming the line if not."""
    with _reading(path), open_text(path) as file:
        yield from _read_lines(file, path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply to read; fix the file") from error


@contextmanager
def _open(path: Path, block: int) -> Iterator[_Window]:
    with _reading(path), open_text(path) as file:
        yield _Window(file, path, block)


def _no_list(path: Path, why: str = "") -> DataError:
    return DataError(f"{path} is not a list of objects{why}; LLaVA's training JSON is one list")


class _Doubled:
    """Remembers a key that an object has twice."""

    def __init__(self) -> None:
        self.key: str | None = None

    def table(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return an object of JSON."""
        found = dict(pairs)
        if len(found) < len(pairs):
            self.key = next(key for at, (key, _) in enumerate(pairs) if key in dict(pairs[:at]))
        return found


class _Window:
    """The stretch of a text file that is being read."""

    def __init__(self, file: BinaryIO, path: Path, block: int) -> None:
        self._file, self._path, self._block = file, path, block
        self._doubled = _Doubled()
        self._decode = JSONDecoder(object_pairs_hook=self._doubled.table).raw_decode
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._read = file.tell()  # bytes
        self.at = 0
        """Where in the window we are."""
        self._byte = self._read  # the file's byte at that offset
        self._line, self._column = 1, 0  # of the window's first character

    @property
    def line(self) -> int:
        """The file's line where we are, from 1."""
        return self._position(self.at)[0]

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

    def items(self) -> Iterator[Row]:
        """Yield the values of the JSON list that begins here."""
        self.advance(self.at + 1)
        while (character := self.next_character()) != "]":
            yield self.value()
            character = self.next_character()
            if character == ",":
                self.advance(self.at + 1)
                if self.next_character() == "]":
                    raise self.error("Expecting value")
            elif character != "]":
                raise self.error("Expecting ',' delimiter")
        self.advance(self.at + 1)

    def value(self) -> Row:
        """Read the JSON value that begins here."""
        while True:
            self._doubled.key = None
            try:
                value, end = self._decode(self._text, self.at)
            except JSONDecodeError as error:
                if self._may_be_cut(error) and self._fill():
                    continue
                raise self.error(error.msg, error.pos) from error
            except ValueError as error:  # a whole number of more digits than Python reads
                raise self.error("a number is too long") from error
            # `0`, `0.` and `0e-` at the window's end may be the beginning of a longer number
            # (in this order: to copy the rest of the window for each row would take half the time)
            whole = isinstance(value, dict | list) or self._text[end:].strip(".eE+-")
            if not whole and self._fill():
                continue
            start = self._byte
            self.advance(end)
            return Row(value, start, self._byte - start, self._doubled.key)

    def advance(self, end: int) -> None:
        """Move to this offset of the window."""
        piece = self._text[self.at : end]
        self._byte += len(piece) if piece.isascii() else len(piece.encode())
        self.at = end

    def error(self, message: str, offset: int | None = None) -> DataError:
        """Return an error that names line and column of an offset; by default the current one."""
        line, column = self._position(self.at if offset is None else offset)
        return DataError(
            f"{self._path}:{line}:{column + 1}: not valid JSON: {message}; fix the file"
        )

    def _may_be_cut(self, error: JSONDecodeError) -> bool:
        """Whether the error may only mean that the window ends within the value."""
        # 16 characters: `false`, a number or an escape such
        # as \u00e4 may be cut at the end of the window
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16

    def _fill(self) -> bool:
        """Drop what was read, read on; return whether there was more."""
        unread = len(self._text) - self.at
        if unread > _LONGEST_ROW:
            raise self.error(f"a row is longer than {_LONGEST_ROW >> 20} MB (a quote is missing?)")
        # at least as much as is there already:
        # a long row is then decoded a few times, not once a block
        block = self._file.read(max(self._block, unread))
        try:
            new = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = self._read + error.start - len(self._decoder.getstate()[0])
            raise DataError(
                f"{self._path} is not UTF-8 text (byte {offset}); convert it"
            ) from error
        if not block:
            return False
        self._read += len(block)
        self._line, self._column = self._position(self.at)
        self._text = self._text[self.at :] + new
        self.at = 0
        return True

    def _position(self, offset: int) -> tuple[int, int]:
        """Return the line, from 1, and the column, from 0, of an offset in the window."""
        newlines = self._text.count("\n", 0, offset)
        if not newlines:
            return self._line, self._column + offset
        return self._line + newlines, offset - self._text.rindex("\n", 0, offset) - 1


def _read_lines(file: BinaryIO, path: Path) -> Iterator[Row]:
    start, number = file.tell(), 0
    doubled = _Doubled()
    while line := file.readline(_LONGEST_ROW):
        number += 1
        if len(line) == _LONGEST_ROW:
            raise DataError(f"{path}:{number}: the line is longer than {_LONGEST_ROW >> 20} MB")
        doubled.key = None
        try:
            text = line.decode("utf-8-sig")  # files with a mark may have been joined
            value = json.loads(text, object_pairs_hook=doubled.table) if text.strip() else None
        except JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}:{error.colno}: not valid JSON: {error.msg}; fix the file"
                f"{_A_LIST * text.startswith('[')}"
            ) from error
        except UnicodeDecodeError as error:
            offset = start + error.start
            raise DataError(f"{path} is not UTF-8 text (byte {offset}); convert it") from error
        except ValueError as error:  # a whole number of more digits than Python reads
            raise DataError(f"{path}:{number}: a number is too long; fix the file") from error
        if isinstance(value, dict):
            yield Row(value, start, len(line), doubled.key, number)
        elif text.strip():
            hint = _A_LIST * isinstance(value, list)
            raise DataError(f"{path}:{number}: the line is no JSON object; fix the file{hint}")
        start += len(line)
