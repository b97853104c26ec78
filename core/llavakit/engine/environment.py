"""What a run was, and on what it ran: recipe.toml and environment.json."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from llavakit.recipe.files import without_none, write_text
from llavakit.recipe.recipe import Recipe
from llavakit.recipe.redaction import redacted

if TYPE_CHECKING:
    import torch

_PACKAGES = ("llavakit", "torch", "transformers", "tokenizers", "numpy", "pillow", "triton")


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe.toml from which the same run can be made again; it holds no key."""
    table = redacted(without_none(recipe.model_dump(mode="json", exclude_defaults=True)))
    return tomli_w.dumps(table)


def write_environment(device: torch.device | None, directory: Path) -> None:
    """Write environment.json; `device` is None while no step has asked for one."""
    packages = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": None if device is None else str(device),  # None: no step asked for one
        "device_name": "no device",
        "cpu_count": os.cpu_count(),
    }
    if device is not None:
        import torch

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found |= {"device_name": name, "threads": torch.get_num_threads()}
    write_text(directory / "environment.json", json.dumps(found, indent=2))
