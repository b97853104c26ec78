"""Finds the line of every key in a TOML file: the display `toml` of `llavakit.displays`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llavakit import Key, Span

_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_PART = re.compile(r"[ \t]*(?:\"((?:[^\"\\\n]|\\.)*)\"|'([^'\n]*)'|([A-Za-z0-9_-]+))[ \t]*")
# Values are only stepped over: tomllib has read the text before, so that it is valid.
_VALUE = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|' + r"'''.*?'{3,5}|"
    r'"(?:[^"\\\n]|\\.)*"|' + r"'[^'\n]*'|[^,\]}#\n]+",
    re.DOTALL,
)


def find_keys(text: str) -> Mapping[Key, Span]:
    """Return where every key, table and array element of a valid TOML text is written."""
    return _Scanner(text).document()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._spans: dict[Key, Span] = {}
        self._last: dict[Key, int] = {}  #: The current element of each array of tables.

    def document(self) -> dict[Key, Span]:
        table: Key = ()
        while self._more():
            if self._take("[["):
                table = self._header(array=True)
                self._take("]]")
            elif self._take("["):
                table = self._header(array=False)
                self._take("]")
            else:
                self._pair(table)
        return self._spans

    def _more(self) -> bool:
        """Skip blanks and comments; say whether anything is left."""
        match = _BLANK.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._at < len(self._text)

    def _take(self, mark: str) -> bool:
        found = self._text.startswith(mark, self._at)
        self._at += len(mark) if found else 0
        return found

    def _name(self) -> list[tuple[str, int, int]]:
        """Read a dotted key; return its parts, each with begin and end."""
        parts = []
        while match := _PART.match(self._text, self._at):
            begin, end = match.span(match.lastindex or 0)
            parts.append((match[match.lastindex or 0], begin, end))
            self._at = match.end()
            if not self._take("."):
                return parts
        self._at += not parts  # no key here: the text is not valid, go on
        return parts

    def _header(self, *, array: bool) -> Key:
        path: Key = ()
        parts = self._name()
        for number, (part, begin, end) in enumerate(parts, start=1):
            path = (*path, part)
            whole = number == len(parts)
            if array and whole:
                self._last[path] = self._last.get(path, -1) + 1
            # a table below an array's newest element:
            # `[steps.data]` belongs to the last `[[steps]]`
            if path in self._last:
                self._note(path, begin, end)
                path = (*path, self._last[path])
            self._note(path, begin, end, stated=whole)
        return path

    def _pair(self, table: Key) -> None:
        path = table
        for part, begin, end in self._name():
            path = (*path, part)
            self._note(path, begin, end)
        if self._take("="):
            self._value(path)

    def _value(self, path: Key) -> None:
        self._more()
        if self._take("{"):
            while self._more() and not self._take("}"):
                self._pair(path)
                self._more()
                self._take(",")
        elif self._take("["):
            index = 0
            while self._more() and not self._take("]"):
                self._note((*path, index), self._at, self._at + 1)
                self._value((*path, index))
                self._more()
                self._take(",")
                index += 1
        elif match := _VALUE.match(self._text, self._at):
            self._at = match.end()

    def _note(self, path: Key, begin: int, end: int, *, stated: bool = False) -> None:
        if stated or path not in self._spans:
            start = self._text.rfind("\n", 0, begin) + 1
            line = self._text.count("\n", 0, begin) + 1
            self._spans[path] = Span(line, begin - start, end - start)
