"""`llava-run import`: turns another layout into a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from llavakit.contracts.commands import Commands
from llavakit_plugins.commands.flags import add_model, load_weights, refuse_to_mix, writing


def add(commands: Commands) -> None:
    imports = commands.add_parser("import", help="turn another layout into a model folder")
    add_model(imports, "source")
    imports.add_argument("out", type=Path, help="the folder to write")
    imports.set_defaults(command=_import)


def _import(arguments: argparse.Namespace) -> int:
    from llavakit import save_model, shown

    refuse_to_mix(arguments.out, arguments.source, arguments.base, arguments.vision)
    with writing(arguments.out):
        otherwise = (
            "not turned into a model folder: its layout keeps no weights that training could go "
            "on from"
        )
        save_model(load_weights(arguments.source, arguments, otherwise), arguments.out)
    print(shown(f"wrote {arguments.out}"))
    return 0
