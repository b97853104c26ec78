"""`llava-run recipes`: lists the built-in recipes."""

from __future__ import annotations

import argparse

from llavakit.contracts.commands import Commands


def add(commands: Commands) -> None:
    recipes = commands.add_parser("recipes", help="list the built-in recipes")
    recipes.set_defaults(command=_recipes)


def _recipes(arguments: argparse.Namespace) -> int:
    from llavakit import recipe_folder, shown

    folder = recipe_folder()
    recipes = {
        file.relative_to(folder).with_suffix("").as_posix(): file.read_text(encoding="utf-8")
        for file in sorted(folder.rglob("*.toml"))
    }
    width = max(map(len, recipes)) + 2
    for name, text in recipes.items():
        comment = text.partition("\n")[0].removeprefix("#").strip()
        print(shown(f"{name:{width}}{comment}"))
    return 0
