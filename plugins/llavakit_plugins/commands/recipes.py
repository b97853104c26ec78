"""`llava-run recipes`: lists the installed recipes."""

from __future__ import annotations

import argparse

from llavakit.contracts.commands import Commands


def add(commands: Commands) -> None:
    recipes = commands.add_parser("recipes", help="list the installed recipes")
    recipes.set_defaults(command=_recipes)


def _recipes(arguments: argparse.Namespace) -> int:
    from importlib.metadata import entry_points

    from llavakit import recipe_files, shown

    packages = {
        point.name: point.dist.name if point.dist else "an unknown package"
        for point in entry_points(group="llavakit.recipes")
    }
    files = recipe_files()
    width = max(map(len, files)) + 2
    for name, file in files.items():
        # a recipe's first line is a comment that says what it trains
        comment = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        package = packages.get(name.partition("/")[0])
        print(shown(f"{name:{width}}{comment}{f'  ({package})' if package else ''}"))
    return 0
