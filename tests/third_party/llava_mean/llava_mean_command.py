"""A command of its own: `llava-run count FILE` counts the rows of a JSON list."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llavakit.contracts.commands import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("count", help="count the rows of a JSON list")
    parser.add_argument("file", type=Path)
    parser.set_defaults(command=count)


def count(arguments: argparse.Namespace) -> int:
    from llavakit import DataError

    rows = json.loads(arguments.file.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise DataError(f"{arguments.file} is no list; give one")
    print(len(rows))
    return 0
