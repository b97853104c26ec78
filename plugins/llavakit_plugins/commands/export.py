"""`llava-run export`: writes a model in another layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from llavakit.contracts.commands import Commands
from llavakit_plugins.commands.flags import (
    add_model,
    add_settings,
    load_weights,
    refuse_to_mix,
    writing,
)


def add(commands: Commands) -> None:
    export = commands.add_parser("export", help="write a model in another layout")
    add_model(export, "model")
    export.add_argument("out", type=Path, help="the folder to write")
    export.add_argument("--format", required=True, help="the exporter: see llava-run plugins")
    add_settings(export, "its options")
    export.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from llavakit import Registry, shown
    from llavakit.contracts.interfaces import Exporter
    from llavakit_plugins.commands.options import build_from

    registry = Registry.installed()
    exporter = build_from(registry.get(Exporter, arguments.format), arguments.set, registry)
    # before the model is loaded, which may take minutes
    refuse_to_mix(arguments.out, arguments.model, arguments.base, arguments.vision)
    with writing(arguments.out):
        otherwise = "not written in another layout; export the model folder that it was made of"
        model = load_weights(arguments.model, arguments, otherwise)
        # other programs read no LoRA adapters in these layouts: they are added to the weights
        figures = exporter.export(model.merged(), arguments.out)
    for name, value in figures.items():
        print(shown(f"{name}: {value}"))
    return 0
