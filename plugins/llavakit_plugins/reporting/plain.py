"""Tables for a terminal."""

from __future__ import annotations

from llavakit import aligned
from llavakit.contracts.sections import Table
from llavakit_plugins.reporting.values import cells


def plain(table: Table) -> str:
    """Return the table in aligned columns, numbers to the right, its title above."""
    numeric, rows = cells(table)
    head = [table.title, *([table.caption] if table.caption else [])]
    return "\n".join([*head, *aligned([table.columns, *rows], numeric)])
