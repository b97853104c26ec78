"""Finds the line of a key in a TOML file. `tomllib` keeps values only, not their places."""

from __future__ import annotations

import re
from typing import NamedTuple

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_PAIR = re.compile(r"^\s*([A-Za-z0-9_.\"'-]+)\s*=")

Key = tuple[str | int, ...]


class Span(NamedTuple):
    """A stretch of one line: 1-based line, 0-based columns."""

    line: int
    start: int
    end: int


class Place(NamedTuple):
    """Where a key is, and how many of its parts are written down there."""

    span: Span
    depth: int


def locate(text: str, key: Key, alias: Key | None = None) -> Place:
    """Return the place of `key`, or of the nearest table around it that is written down.

    `alias` is another spelling of the same key: a recipe with a `base` changes a step by its name,
    `[steps.finetune]`, where the key has its number.
    """
    best, best_depth = Span(1, 0, 0), 0
    table: Key = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            if header[1] == "[[":
                counts[header[2]] = counts.get(header[2], -1) + 1
            path, span = _table(header[2], counts), Span(number, *header.span(2))
            table = path
        elif pair := _PAIR.match(line):
            path, span = (*table, *pair[1].split(".")), Span(number, *pair.span(1))
        else:
            continue
        depth = len(path)
        if path in (key[:depth], (alias or key)[:depth]) and depth > best_depth:
            best, best_depth = span, depth
            inner = re.search(rf"\b{re.escape(str(key[-1]))}\b\s*=", line[span.end :])
            if depth < len(key) and inner:  # a key of an inline table
                start = span.end + inner.start()
                best, best_depth = Span(number, start, start + len(str(key[-1]))), depth + 1
    return Place(best, best_depth)


def _table(name: str, counts: dict[str, int]) -> Key:
    """Return the key of `[name]`, each array of tables in it with its current index."""
    path: list[str | int] = []
    prefix = ""
    for part in name.split("."):
        path.append(part)
        prefix = f"{prefix}.{part}" if prefix else part
        if prefix in counts:
            path.append(counts[prefix])
    return tuple(path)
