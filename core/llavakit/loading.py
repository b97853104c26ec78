"""Loads a model of any layout that is installed, recognised by the folder's content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llavakit.assembly import is_model, load_model
from llavakit.errors import ModelError
from llavakit.interfaces import Exporter
from llavakit.registry import Registry


def pick_device(name: str | torch.device) -> torch.device:
    """Return a device; `auto` is CUDA where there is one, else the CPU."""
    if isinstance(name, torch.device):
        return name
    try:
        device = torch.device(_automatic() if name == "auto" else name)
    except RuntimeError as error:
        raise ModelError(
            f"device `{name}` is not one torch knows; use auto, cpu or cuda"
        ) from error
    try:
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device `{name}` is not available on this machine; use cpu or auto"
        ) from error
    return device


def _automatic() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_any(path: Path, *, device: str | torch.device, dtype: torch.dtype | None) -> Any:
    """Return the model in a folder: our own layout, or one that an exporter recognises."""
    place = pick_device(device)
    registry = Registry.installed()
    if not path.exists():
        raise ModelError(f"model {path} does not exist; give the folder a run or an export wrote")
    if is_model(path):
        return load_model(path, registry, device=place, dtype=dtype).eval()
    layouts = registry.all(Exporter)
    for exporter in layouts.values():
        if exporter.recognises(path):
            return exporter.load(path, device=place, dtype=dtype)
    raise ModelError(
        f"{path} holds no model that is recognised; known layouts: "
        f"{', '.join(('llavakit (model.toml)', *layouts))}"
    )
