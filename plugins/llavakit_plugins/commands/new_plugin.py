"""`llava-run new-plugin`: writes a package for a plugin, with tests that pass."""

from __future__ import annotations

import argparse
from pathlib import Path

from llavakit.contracts.commands import Commands


def add(commands: Commands) -> None:
    new = commands.add_parser("new-plugin", help="write a package for a plugin of your own")
    new.add_argument("name", metavar="NAME", help="the package's name, such as llava-pooled")
    new.add_argument(
        "--kind",
        action="append",
        required=True,
        metavar="KIND",
        help="what it adds: connector, dataset, benchmark, tracker, command ...; may be given more "
        "than once, and `all` is one of each",
    )
    new.add_argument("--out", type=Path, metavar="DIR", help="the folder to write (NAME)")
    new.set_defaults(command=_new_plugin)


def _new_plugin(arguments: argparse.Namespace) -> int:
    from llavakit import shown
    from llavakit_plugins.scaffolding.package import known_kinds, new_package

    kinds = list(known_kinds()) if arguments.kind == ["all"] else arguments.kind
    folder = arguments.out or Path(arguments.name)
    files = new_package(arguments.name, kinds, folder)
    for file in files:
        print(shown(str(file)))
    print(shown(f'\ncd {folder}\npip install "pip>=25.1" && pip install -e . --group dev\npytest'))
    return 0
