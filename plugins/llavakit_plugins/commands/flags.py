"""Flags that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.contracts.errors import ModelError


def add_settings(command: argparse.ArgumentParser, sentence: str) -> None:
    """Add `--set`, which may be given more than once; `sentence` says what it changes."""
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=sentence)


def add_model(command: argparse.ArgumentParser, name: str) -> None:
    """Add the model to load, and what some layouts leave out of its folder."""
    command.add_argument(name, type=Path, help="a model folder of any layout, or a name on the hub")
    add_left_out(command)


def add_left_out(command: argparse.ArgumentParser) -> None:
    """Add what some layouts leave out of a model's folder."""
    group = command.add_argument_group("what a layout may leave out (docs/layouts.md)")
    group.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="the language model of an adapter, projector or delta",
    )
    group.add_argument("--vision", type=Path, metavar="DIR", help="the vision encoder")
    group.add_argument("--template", metavar="NAME", help="the prompt template")


def load_model(
    path: Path,
    arguments: argparse.Namespace,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Return the model at `path`, with what `add_model` has added."""
    import llavakit

    return llavakit.load(
        path,
        device=device,
        base=arguments.base,
        vision=arguments.vision,
        template=arguments.template,
        options=options,
    )


def refuse_to_replace(folder: Path) -> None:
    """Raise ModelError for a folder that holds something: writing would replace it whole."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ModelError(f"{folder} is there already; name a new folder, or remove that one")
