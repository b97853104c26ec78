"""Grids of tiles of LLaVA-NeXT and OneVision, which layouts state in pixels as
`image_grid_pinpoints`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from llavakit import LlavaModel, ModelError, Tiling, Use, View, VisionEncoder, without_none
from llavakit_plugins.checkpoints.families import LLAVA, NEXT, NEXT_VIDEO, ONEVISION, Family
from llavakit_plugins.checkpoints.prompts import NOTE
from llavakit_plugins.huggingface.json_files import is_count, shown
from llavakit_plugins.tilings.anyres import Anyres, AnyresOptions
from llavakit_plugins.tilings.geometry import grid_edge
from llavakit_plugins.tilings.video import VideoOptions

_log = logging.getLogger("llavakit")


class Grids(NamedTuple):
    """How transformers' classes are told of a model's tiles."""

    family: Family
    points: list[list[int]]  #: [height, width] in pixels; none where each image is one view.
    cap: int | None = None  #: OneVision's: the most embeddings of the tiles, in views.
    video: VideoOptions | None = None


def anyres_of(
    family: Family, config: Mapping[str, Any], vision: VisionEncoder, folder: Path, longest: int
) -> Use[Tiling]:
    """Return the tiling of one of transformers' LLaVAs that have tiles.

    `longest` is how many rows the language model reads. Raises ModelError for pinpoints that are no
    multiples of the encoder's square, and for what is done to videos and not known here.
    """
    points = config.get("image_grid_pinpoints")
    if points is None:
        points = [list(point) for point in family.pinpoints]
    use = anyres_use(tiles_of(points, vision.image_size, folder), vision)
    if family is NEXT_VIDEO:
        pooled = _pooled(config, folder)
        return _with(use, video=_frames(pooled, config, vision, longest, folder))
    if family is not ONEVISION:
        return use
    aspect = config.get("vision_aspect_ratio", "anyres_max_9")
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect))
    if found is None:
        raise ModelError(
            f"{folder}: `vision_aspect_ratio` is {shown(aspect)}; it must be anyres_max_9, or "
            "another number"
        )
    video = _frames({}, config, vision, longest, folder)
    return _with(_of_onevision(use, vision, int(found[1])), video=video)


def _with(use: Use[Tiling], **more: Any) -> Use[Tiling]:
    return use.model_validate({"use": use.use, **without_none({**use.options, **more})})


def _pooled(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return how LLaVA-NeXT-Video pools the features of each frame."""
    mode = config.get("spatial_pool_mode", "average")
    stride = config.get("spatial_pool_stride", 2)
    if mode not in ("average", "max") or not is_count(stride):
        raise ModelError(
            f"{folder}: `spatial_pool_mode` is {shown(mode)} and `spatial_pool_stride` "
            f"{shown(stride)}; average and max can be read, with a whole number above 0"
        )
    return {"pool": mode, "stride": stride, "pool_features": True, "newline": "none"}


def _frames(
    how: Mapping[str, Any],
    config: Mapping[str, Any],
    vision: VisionEncoder,
    longest: int,
    folder: Path,
) -> dict[str, Any]:
    """Return options of `video`, with the frames that an export of ours noted.

    No other checkpoint says how many: then they are at most 32, in half of what is read.
    """
    noted = config.get(NOTE)
    found = noted.get("video") if isinstance(noted, Mapping) else None
    try:
        if isinstance(found, Mapping):
            known = {key: found[key] for key in _NOTED if key in found}
            return VideoOptions.model_validate({**how, **known}).model_dump(exclude_unset=True)
        options = VideoOptions.model_validate(how)
    except ValidationError as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{folder}: config.json says of videos what cannot be used ({reason}); fix it, or "
            "remove `video` from what an export noted under `llavakit`"
        ) from error
    edge = grid_edge(View(vision.image_size, vision.tokens(vision.image_size)))
    rows = max(1, edge // options.stride) ** 2
    return {"frames": max(1, min(options.frames, longest // 2 // rows)), **how}


_NOTED = ("frames", "rate", "spread")


def note_frames(grids: Grids) -> dict[str, Any]:
    """Return what an export notes of videos, for `anyres_of`: no layout says it."""
    video = grids.video
    if video is None:
        return {}
    return {"video": without_none({key: getattr(video, key) for key in _NOTED})}


def _of_onevision(use: Use[Tiling], vision: VisionEncoder, cap: int) -> Use[Tiling]:
    """Return a tiling with OneVision's cap, which leaves the images of a sample of several whole.

    So are its models trained and evaluated, and so transformers' processor does it.
    """
    more: dict[str, Any] = {"cap": cap, "only_alone": True}
    if (colour := _colour(vision)) is not None:
        more["pad"] = list(colour)
    return _with(use, **more)


def _colour(vision: VisionEncoder) -> tuple[float, float, float] | None:
    square: Any = getattr(vision, "square", None)
    return None if square is None else square.mean


def anyres_of_original(
    config: Mapping[str, Any], vision: VisionEncoder, folder: Path, longest: int
) -> Use[Tiling] | None:
    """Return the tiling of an original LLaVA; its pinpoints are [width, height] in pixels.

    None where it has none. `longest` is how many rows the language model reads. Raises ModelError
    for what `anyres` here does not do.
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
    if found[1] is not None:
        use = _of_onevision(use, vision, int(found[1]))
    if (how := _original_video(config, folder, unpads=merge == "spatial_unpad")) is not None:
        use = _with(use, video=_frames(how, config, vision, longest, folder))
    if merge == "spatial_unpad":
        return use
    # the original interpolates what is unpadded, and nothing else
    return _with(use, unpad=False, newline=False, cap=None)


def _original_video(
    config: Mapping[str, Any], folder: Path, *, unpads: bool
) -> dict[str, Any] | None:
    """Return how an original LLaVA shows videos; None where config.json says nothing of them."""
    mode = config.get("mm_spatial_pool_mode")
    if mode is None:
        return None
    line = config.get("mm_newline_position", "one_token")
    fits = str(mode) in _POOLED and str(line) in _LINES
    if not fits or config.get("add_faster_video"):
        _log.warning(
            "note: %s: videos pooled by %s, with `mm_newline_position` %s%s, are not shown here; "
            "images are", folder, shown(mode), shown(line),
            " and `add_faster_video`" if config.get("add_faster_video") else "",
        )  # fmt: skip
        return None
    newline = _LINES[line] if unpads or line != "one_token" else "none"
    return {"pool": _POOLED[mode], "newline": newline}


_POOLED = {"average": "average", "bilinear": "interpolate"}
_LINES = {"one_token": "end", "frame": "frame", "grid": "row", "no_token": "none"}


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
    pairs = [list(grid) for grid in grids]
    rows, columns = pairs[-1]
    every = [[row, column] for row in range(1, rows + 1) for column in range(1, columns + 1)]
    options: dict[str, Any] = {
        "use": "anyres",
        "grids": f"{rows}x{columns}" if pairs == every and max(rows, columns) < 100 else pairs,
    }
    square: Any = getattr(vision, "square", None)
    if square is not None and square.interpolation != "bicubic":
        options["interpolation"] = square.interpolation
    return Use[Tiling].model_validate(options)


def grids_of(model: LlavaModel, layout: str) -> Grids:
    """Return a model's family and grids.

    Raises ModelError for a tiling that none of LLaVA-NeXT, its video model and OneVision has.
    """
    if model.tiling is None:
        return Grids(LLAVA, [])
    own = model.tiling.options if isinstance(model.tiling, Anyres) else None
    square: Any = getattr(model.vision, "square", None)
    usual = AnyresOptions()
    if own is not None and own.cap is not None:  # OneVision's
        usual = AnyresOptions(cap=own.cap, only_alone=True, pad=_colour(model.vision))
    same = own is not None and all(
        getattr(own, name) == getattr(usual, name)
        for name in ("unpad", "newline", "cap", "only_alone", "pad", "max_tiles")
    )
    if own is None or not same or (square and own.interpolation != square.interpolation):
        raise ModelError(
            f"tiling `{model.tiling.name}` with these options does not fit into the layout "
            f"`{layout}`, which has `anyres` as LLaVA-NeXT has it, and as OneVision has it with "
            "`cap`, `only_alone` and `pad` of the encoder's mean (both unpadded, with `newline`, "
            "without `max_tiles`, resized with the encoder's `interpolation`); the model folder "
            "and `--format onnx` keep it"
        )
    family = _family_of(own, getattr(square, "aspect", None), layout)
    edge = model.vision.image_size
    points = [[rows * edge, columns * edge] for rows, columns in own.grids]
    return Grids(family, points, own.cap, own.video)


def _family_of(own: AnyresOptions, aspect: str | None, layout: str) -> Family:
    """Return the family whose tiles and videos a tiling has; raises ModelError for videos alone.

    `aspect` is how the encoder makes a square of a frame.
    """
    video = own.video
    if video is None:
        return NEXT if own.cap is None else ONEVISION
    how = (video.stride, video.pool_features, video.newline, aspect)
    if own.cap is None and video.pool in ("average", "max") and how == (2, True, "none", "crop"):
        return NEXT_VIDEO
    interpolates = video.pool == "interpolate" and how == (2, False, "end", "squash")
    if own.cap is not None and interpolates:
        return ONEVISION
    raise ModelError(
        f"tiling `anyres` with this `video` does not fit into the layout `{layout}`, which has "
        'LLaVA-NeXT-Video\'s (`pool = "average"` or "max", `pool_features = true`, `newline = '
        '"none"`, the encoder\'s `aspect = "crop"`) and, with `cap`, OneVision\'s (`pool = '
        '"interpolate"`, `newline = "end"`, `aspect = "squash"`), both with `stride = 2`; the '
        "model folder keeps it"
    )
