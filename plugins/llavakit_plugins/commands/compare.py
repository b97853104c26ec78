"""`llava-run compare`: puts finished runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from llavakit.contracts.commands import Commands


def add(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="put runs side by side, by recipe and seed")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    compare.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="show only this, for example evaluate.sighted_* (evaluations, or the last step that "
        "all recipes have)",
    )
    compare.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    compare.add_argument("--csv", type=Path, metavar="FILE", help="also write a table")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from llavakit import printable_json, shown, write_text
    from llavakit_plugins.comparing.table import compare
    from llavakit_plugins.reporting.page import comparison_page

    found = compare(arguments.runs, arguments.metric)
    if arguments.csv is not None:
        write_text(arguments.csv, found.csv())
    if arguments.html is not None:
        runs = f"{sum(len(group.runs) for group in found.groups)} runs"
        facts = [runs, *map(str, found.orders), *found.notes]
        sections = [found.table(), *([found.order_table()] if found.orders else [])]
        page = comparison_page("Runs side by side", facts, sections, found.left_out)
        write_text(arguments.html, page)
    print(printable_json(found.json()) if arguments.json else shown(found.text()))
    return 0
