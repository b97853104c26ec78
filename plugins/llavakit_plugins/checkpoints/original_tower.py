"""Finds the vision tower of an original LLaVA, which its checkpoint may only name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llavakit import ModelError
from llavakit_plugins.huggingface.hub import fetch_folder
from llavakit_plugins.huggingface.json_files import check_shape, read_json
from llavakit_plugins.huggingface.known_configs import KNOWN
from llavakit_plugins.vision.pixels import Pixels, read_pixels, usual_pixels
from llavakit_plugins.vision.vision_transformer import vision_state

FOLDER = "vision_tower"
"""Where an export of ours puts the vision tower, within the checkpoint's folder."""


class Tower(NamedTuple):
    """A vision tower: its configuration, tensors, and what is taken of it."""

    where: Path
    table: dict[str, Any]
    state: dict[str, Tensor]
    layer: int
    select: str
    pixels: Pixels


def find_tower(
    folder: Path,
    config: Mapping[str, Any],
    given: Path | None,
    *,
    inside: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> Tower:
    """Return the vision tower: the one that the user gives, that config.json names, or that is
    inside the checkpoint.

    Raises ModelError if it is not on this machine.
    """
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    name = name[0] if isinstance(name, list) and name else name
    tower_folder = given or _find_folder(folder, name, weights=not inside)
    if inside:
        state, where = dict(inside), folder
    elif tower_folder is not None:
        state, where = vision_state(tower_folder, dtype), tower_folder
    else:
        raise ModelError(
            f"{folder} names the vision tower `{name}` and does not hold its weights; fetch it "
            f"(`hf download {name} --local-dir DIR`) and give its folder as --vision DIR"
        )
    table = _table(tower_folder, name, folder)
    check_shape(table, f"{tower_folder or folder}: config.json of the vision tower")
    layer, select = _layer(config, folder), _select(config, folder)
    if str(table["model_type"]).startswith("siglip"):
        # the original takes the last layer off a SigLIP, and its head; what is left gives the
        # features of every patch, whatever config.json says of `mm_vision_select_layer`
        layer, select = -2, "patch"
        if inside:
            layer, table = -1, table | _cut(inside)
    edge = table.get("image_size", 224)
    usual = usual_pixels(str(table["model_type"]))
    pixels = (tower_folder and read_pixels(tower_folder, edge, usual)) or usual
    return Tower(
        where,
        table,
        state,
        layer,
        select,
        pixels._replace(aspect=_aspect(config, folder, pixels)),
    )


def _cut(inside: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the shape of a SigLIP in an original's checkpoint, which is not the hub's."""
    numbers = [
        int(found[1]) for name in inside if (found := re.match(r"encoder\.layers\.(\d+)\.", name))
    ]
    return {
        "num_hidden_layers": 1 + max(numbers, default=-1),
        "vision_use_head": any(name.startswith("head.") for name in inside),
    }


def _find_folder(folder: Path, name: Any, *, weights: bool) -> Path | None:
    """Return the folder of a vision tower: beside the checkpoint, within it, or from the hub."""
    names = [Path(name)] if isinstance(name, str) and name else []
    # `folder / path` is the path itself where that is absolute
    for tower_folder in (*(folder / path for path in names), folder / FOLDER):
        if (tower_folder / "config.json").is_file() and tower_folder != folder:
            return tower_folder
    try:
        return fetch_folder(str(name), weights=weights) if names else None
    except ModelError:
        return None


def _table(tower_folder: Path | None, name: Any, folder: Path) -> dict[str, Any]:
    if tower_folder is not None:
        table = read_json(tower_folder / "config.json")
        inner = table.get("vision_config")  # of a CLIP, or of a LLaVA, as a whole
        table = dict(inner) if isinstance(inner, dict) else table
    elif name in KNOWN:
        table = dict(KNOWN[name])
    else:
        raise ModelError(
            f"{folder} holds the weights of its vision tower, but not its shape, and `{name}` is "
            "not on this machine; give a folder with its config.json as --vision DIR"
        )
    table.setdefault("model_type", "clip_vision_model")
    return table


def _layer(config: Mapping[str, Any], folder: Path) -> int:
    layer = config.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise ModelError(f"{folder}: `mm_vision_select_layer` is {layer!r}; it must be a number")
    return layer


def _select(config: Mapping[str, Any], folder: Path) -> str:
    select = config.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise ModelError(
            f"{folder}: `mm_vision_select_feature` is {select!r}; it must be patch or cls_patch"
        )
    return str(select)


def _aspect(config: Mapping[str, Any], folder: Path, pixels: Pixels) -> Any:
    aspect = config.get("image_aspect_ratio") or "square"
    if aspect == "pad":
        return "pad"
    if aspect == "square" or re.fullmatch(r"anyres(_max_\d+)?", str(aspect)):
        # the original's "square" leaves the image to the
        # tower's own processor, which may crop or squash
        return "crop" if pixels.aspect == "pad" else pixels.aspect
    raise ModelError(
        f"{folder}: `image_aspect_ratio` is {aspect!r}; square, pad and anyres can be read"
    )
