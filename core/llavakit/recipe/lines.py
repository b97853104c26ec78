"""Where a key of a TOML text is written: `tomllib` keeps values only, not their lines.

The lines are found by the entry point `toml` of the group `llavakit.displays`, called with a text:
it returns the `Span` of every key. Without it, problems name the file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import NamedTuple

Key = tuple[str | int, ...]


class Span(NamedTuple):
    """A stretch of one line: 1-based line, 0-based columns."""

    line: int
    start: int
    end: int


class Location(NamedTuple):
    """Where a key is, and how many of its parts are written down there."""

    span: Span
    depth: float


def locate(text: str, *spellings: Key) -> Location:
    """Return where a key is, or the nearest table around it that is written down.

    `spellings` are the key in all its forms: a recipe with a `base` changes a step by its name,
    `[steps.finetune]`, where the key has its number. `text` is valid TOML.
    """
    written = find_keys(text)
    for depth in range(max(map(len, spellings)), 0, -1):
        for key in spellings:
            if len(key) >= depth and key[:depth] in written:
                return Location(written[key[:depth]], depth)
    return Location(Span(1, 0, 0), 0)


@lru_cache(maxsize=16)
def find_keys(text: str) -> Mapping[Key, Span]:
    """Return where every key, table and array element of a valid TOML text is written."""
    finders = entry_points(group="llavakit.displays", name="toml")
    return next((finder.load()(text) for finder in finders), {})
