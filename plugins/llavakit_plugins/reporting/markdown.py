"""Markdown from plain text: nothing in a text is taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from llavakit import printable

# `_` within a word is no markup in GitHub's Markdown, and `snake_case` stays readable without `\`.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~]|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])")


def escape(text: str) -> str:
    """Return a text as one line of Markdown that shows it; its line ends become `<br>`."""
    shown = map(printable, text.splitlines())
    lines = (_SPECIAL.sub(r"\\\g<0>", line.strip()) for line in shown)
    return "<br>".join(line for line in lines if line)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool] = ()
) -> Iterator[str]:
    """Yield the lines of a table of escaped cells; `right` says which columns are aligned right.

    Rows may be longer or shorter than the head.
    """
    width = max(map(len, [head, *rows])) or 1
    rules = ["--:" if is_right else "---" for is_right in right]
    for cells, filler in ((head, ""), (rules, "---"), *((row, "") for row in rows)):
        padded = (cell for cell, _ in zip_longest(cells, range(width), fillvalue=filler))
        yield f"| {' | '.join(map(str, padded))} |"


def code(text: str, language: str = "") -> str:
    """Return a block of code, fenced by more backticks than it holds in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}"
