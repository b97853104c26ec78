"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.contracts.sections import Table
from llavakit_plugins.reporting.values import cells


def plain(table: Table) -> str:
    """Return the table in aligned columns, numbers to the right, its title above."""
    numeric, rows = cells(table)
    head = [table.title, *([table.caption] if table.caption else [])]
    return "\n".join([*head, *aligned([table.columns, *rows], numeric)])


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Return the rows as lines, their columns two spaces apart; `right` says how each is aligned.

    A row may be shorter than others.
    """
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(right))]
    return [
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=False)
        ).rstrip()
        for row in rows
    ]
