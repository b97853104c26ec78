"""Where keys are stated, in a recipe's files or by `--set`, and how one of them is set.

`tomllib` keeps values only. Their lines are found by the entry point `toml` of the group
`llavakit.displays`, called with a text: it returns the `Span` of every key. Without it, problems
name the file alone.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from llavakit.contracts.errors import RecipeError
from llavakit.registry.entry_points import entry_points, imported

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


@dataclass(frozen=True)
class Source:
    """A recipe file that took part, as text; or a key that was set elsewhere."""

    path: Path = Path()
    text: str = ""
    said: str = ""  #: Where a single key was set, if not in a file, for example `--set seed=1`.
    key: Key = ()  #: Which key that was, as it was written.

    def locate(self, *spellings: Key) -> Location:
        """Return where a key is in the file, or how much of it was set here."""
        if not self.said:
            return locate(self.text, *spellings)
        nowhere = Span(1, 0, 0)
        if any(self.key == key[: len(self.key)] for key in spellings):
            # what --set gives stands for all below it, and the environment is merged with files
            return Location(nowhere, inf if self.said.startswith("--set ") else len(self.key))
        around = [len(key) for key in spellings if key == self.key[: len(key)]]
        return Location(nowhere, max(around, default=0) - 0.5)  # a file that says it comes first


def stated(override: str) -> Source:
    """Return `--set a.b.c=value` as the source of that key."""
    path = override.partition("=")[0].strip().split(".")
    return Source(said=f"--set {override}", key=tuple(path))


def set_key(table: dict[str, Any], override: str) -> None:
    """Set what `a.b.c=value` says in a table. Raises RecipeError where there is no such key."""
    name, separator, text = override.partition("=")
    path = name.strip().split(".")
    if not separator or not all(path):
        raise RecipeError(f"--set {override}: write it as a.b.c=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # numbers and lists without end, too
        value = text.strip()
    node: Any = table
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            index = step_index(node, part, tuple(path[:depth]))
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last and part == "use" and node.get("use", value) != value:
                node.clear()  # another component: the old one's options do not carry over
            if last:
                node[part] = value
            node = node.setdefault(part, {})
        else:
            raise RecipeError(f"--set {override}: `{'.'.join(path[:depth])}` has no parts")


def step_index(items: list[Any], name: str, key: Key) -> int:
    """Return the index of a step by its name or number. Raises RecipeError where none is meant."""
    names = [item.get("use") if isinstance(item, dict) else None for item in items]
    if name.isdecimal() and 1 <= int(name) <= len(items):
        return int(name) - 1
    if names.count(name) == 1:
        return names.index(name)
    known = ", ".join(f"{number} ({use})" for number, use in enumerate(names, start=1))
    what = "more than one entry is" if name in names else "no entry is"
    raise RecipeError(
        f"`{'.'.join(map(str, key))}.{name}`: {what} called `{name}`; there are: {known}"
    )


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
    return next((imported(finder)(text) for finder in finders), {})
