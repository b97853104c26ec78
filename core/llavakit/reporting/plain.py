"""A table for a terminal."""

from __future__ import annotations

from llavakit.reporting.sections import Table
from llavakit.reporting.values import cells


def plain(table: Table) -> str:
    """Return the table in aligned columns, numbers to the right, its title above."""
    numeric, rows = cells(table)
    lines = [list(table.columns), *rows]
    widths = [max(len(row[i]) for row in lines if i < len(row)) for i in range(len(numeric))]
    text = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=False)
        ).rstrip()
        for row in lines
    ]
    head = [table.title, *([table.caption] if table.caption else [])]
    return "\n".join([*head, *text])
