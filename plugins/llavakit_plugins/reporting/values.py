"""Formats numbers and tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llavakit.contracts.sections import Gallery, Table


def show(value: object) -> str:
    """Return a value as people read it."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        case int() | float() if value == int(value) and abs(value) < 1e15:
            return f"{int(value):,}" if abs(value) >= 10_000 else f"{int(value)}"
        case float():
            return f"{value:,.1f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(show, value))
    return str(value)


def words(name: str) -> str:
    """Return a name without its underscores."""
    return name.replace("_", " ")


def cells(table: Table) -> tuple[list[bool], list[list[str]]]:
    """Return which columns are of numbers, and every cell as text, a column's alike in digits."""
    width = max(len(table.columns), *(len(row) for row in table.rows), 0)
    columns = [[row[i] for row in table.rows if i < len(row)] for i in range(width)]
    shown = [_column(column) for column in columns]
    kinds = [{type(cell) for cell in column} - {type(None)} for column in columns]
    numeric = [bool(kind) and kind <= {int, float} for kind in kinds]
    texts = [iter(column) for column in shown]
    return numeric, [[next(texts[i]) for i in range(len(row))] for row in table.rows]


def _column(values: Sequence[str | float | int | None]) -> list[str]:
    floats = [cell for cell in values if isinstance(cell, float) and math.isfinite(cell)]
    plain = all(cell == 0 or 1e-3 <= abs(cell) < 1000 for cell in floats)
    # all numbers of a column get as many digits as the one that needs most, so that they line up
    digits = max((len(show(cell).partition(".")[2]) for cell in floats), default=0)
    return [
        f"{cell:.{digits}f}"
        if plain and isinstance(cell, float) and math.isfinite(cell)
        else show(cell)
        for cell in values
    ]


def verdict(gallery: Gallery) -> tuple[int, int]:
    """Return how many cards are right, and how many are right or wrong."""
    judged = [card.right for card in gallery.cards if card.right is not None]
    return sum(judged), len(judged)


def pairs(values: Mapping[str, Any]) -> str:
    """Return names and their values in one line."""
    return ", ".join(f"{name} {show(value)}" for name, value in values.items())


def extent(points: Sequence[tuple[float, float]]) -> list[float | None]:
    """Return how many points there are; the first, last, lowest and highest finite value."""
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return [len(points), None, None, None, None]
    return [len(points), values[0], values[-1], min(values), max(values)]


def count(done: int, total: int) -> str:
    """Return how many are done, of how many where that is known."""
    return f"{done}/{total}" if total > 0 else f"{done}"
