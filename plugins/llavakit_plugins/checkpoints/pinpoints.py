"""LLaVA-NeXT's grids of tiles, which its layouts state in pixels (`image_grid_pinpoints`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit import LlavaModel, ModelError, Tiling, Use, VisionEncoder
from llavakit_plugins.huggingface.json_files import is_count, shown
from llavakit_plugins.tilings.anyres import Anyres, AnyresOptions

_USUAL = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LlavaNextConfig's


def anyres_of(config: Mapping[str, Any], vision: VisionEncoder, folder: Path) -> Use[Tiling]:
    """Return the tiling of transformers' LLaVA-NeXT; pinpoints are [height, width] in pixels.

    Raises ModelError for pinpoints that are no multiples of the encoder's square.
    """
    points = config.get("image_grid_pinpoints")
    grids = tiles_of(_USUAL if points is None else points, vision.image_size, folder)
    return anyres_use(grids, vision)


def anyres_of_original(
    config: Mapping[str, Any], vision: VisionEncoder, folder: Path
) -> Use[Tiling] | None:
    """Return the tiling of an original LLaVA; its pinpoints are [width, height] in pixels.

    None where it has none. Raises ModelError for what `anyres` here does not do.
    """
    found = re.fullmatch(r"anyres(?:_max_(\d+))?", str(config.get("image_aspect_ratio")))
    if found is None:
        return None
    merge = str(config.get("mm_patch_merge_type", "flat"))
    if merge not in ("spatial_unpad", "spatial"):
        raise ModelError(
            f"{folder}: `mm_patch_merge_type` is {merge!r}; with tiles, spatial_unpad and spatial "
            "can be read"
        )
    points = _listed(config.get("image_grid_pinpoints"), vision.image_size)
    grids = [[rows, columns] for columns, rows in tiles_of(points, vision.image_size, folder)]
    use = anyres_use(grids, vision)
    more: dict[str, Any] = {} if merge == "spatial_unpad" else {"unpad": False, "newline": False}
    if found[1] is not None:
        more["cap"] = int(found[1])
    return use.model_validate({"use": use.use, **use.options, **more})


def _listed(points: Any, edge: int) -> Any:
    """Return pinpoints as pairs; the original also writes them as a text, in pixels or in tiles."""
    if not isinstance(points, str):
        return points
    # a range of grids, as LLaVA-OneVision's scripts write it
    ends = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+)x(\d+)\)", points)]
    if len(ends) >= 2:  # "(1x1),...,(6x6)"
        (left, top), (right, bottom) = ends[0], ends[-1]
        across, down = range(left, right + 1), range(top, bottom + 1)
        return [[edge * columns, edge * rows] for columns in across for rows in down]
    return [list(map(int, pair)) for pair in re.findall(r"[(\[](\d+), *(\d+)[)\]]", points)]


def tiles_of(points: Any, edge: int, folder: Path) -> list[list[int]]:
    """Return pinpoints, pairs of pixels, in tiles of this edge."""
    fits = isinstance(points, list) and points and all(
        isinstance(point, list | tuple) and len(point) == 2
        and all(is_count(side) and side % edge == 0 for side in point)
        for point in points
    )  # fmt: skip
    if not fits:
        raise ModelError(
            f"{folder}: `image_grid_pinpoints` is {shown(points)}; it must list pairs of multiples "
            f"of {edge}, the edge of what the vision tower reads"
        )
    return [[side // edge for side in point] for point in points]


def anyres_use(grids: Sequence[Sequence[int]], vision: VisionEncoder) -> Use[Tiling]:
    """Return the tiling with these grids, resizing as the encoder does."""
    options: dict[str, Any] = {"use": "anyres", "grids": [list(grid) for grid in grids]}
    square: Any = getattr(vision, "square", None)
    if square is not None and square.interpolation != "bicubic":
        options["interpolation"] = square.interpolation
    return Use[Tiling].model_validate(options)


def pinpoints(model: LlavaModel, layout: str) -> list[list[int]] | None:
    """Return a model's grids as [height, width] in pixels; None where each image is one view.

    Raises ModelError for a tiling that LLaVA-NeXT has not.
    """
    if model.tiling is None:
        return None
    own = model.tiling.options if isinstance(model.tiling, Anyres) else None
    square: Any = getattr(model.vision, "square", None)
    usual = AnyresOptions()
    same = own is not None and all(
        getattr(own, name) == getattr(usual, name)
        for name in ("unpad", "newline", "cap", "only_alone", "max_tiles")
    )
    if own is None or not same or (square and own.interpolation != square.interpolation):
        raise ModelError(
            f"tiling `{model.tiling.name}` with these options does not fit into the layout "
            f"`{layout}`, which has LLaVA-NeXT's `anyres` (unpadded, with `newline`, without `cap` "
            "and `max_tiles`, resized with the encoder's `interpolation`); the model folder and "
            "`--format onnx` keep it"
        )
    edge = model.vision.image_size
    return [[rows * edge, columns * edge] for rows, columns in own.grids]
