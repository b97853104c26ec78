"""`llava-run export`: writes a model in another layout."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from llavakit.contracts.commands import Commands
from llavakit.contracts.errors import ModelError
from llavakit_plugins.commands.flags import add_model, add_settings, load_model, refuse_to_replace


def add(commands: Commands) -> None:
    export = commands.add_parser("export", help="write a model in another layout")
    add_model(export, "model")
    export.add_argument("out", type=Path, help="the folder to write")
    export.add_argument("--format", required=True, help="the exporter: see llava-run plugins")
    add_settings(export, "its options")
    export.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from llavakit import LlavaModel, Registry, shown
    from llavakit.contracts.interfaces import Exporter
    from llavakit_plugins.commands.options import build_from

    registry = Registry.installed()
    exporter = build_from(registry.get(Exporter, arguments.format), arguments.set, registry)
    # before the model is loaded, which may take minutes
    refuse_to_replace(arguments.out)
    refuse_to_mix(arguments.out, arguments.model, arguments.base, arguments.vision)
    model = load_model(arguments.model, arguments)
    if not isinstance(model, LlavaModel):
        raise ModelError(
            f"{arguments.model} can be run but not written in another layout; export the model "
            "folder that it was made of"
        )
    # other programs read no LoRA adapters in these layouts: they are added to the weights
    for name, value in exporter.export(model.merged(), arguments.out).items():
        print(shown(f"{name}: {value}"))
    return 0


def refuse_to_mix(out: Path, *sources: Path | None) -> None:
    """Raise ModelError for a folder to write that is one of those to read, or lies inside one."""
    for source in sources:
        # a name on the hub is no folder; links are followed, as one may lead into the other
        if source is not None and source.is_dir():
            place = Path(os.path.realpath(out))
            if place.is_relative_to(os.path.realpath(source)):
                raise ModelError(
                    f"{out} lies inside {source}, which is read and must stay as it is; name a "
                    "folder outside of it"
                )
