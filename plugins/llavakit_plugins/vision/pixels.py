"""Reads and writes image preprocessing as transformers' checkpoints state it.

It stands in preprocessor_config.json, or in processor_config.json under `image_processor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image

from llavakit import ModelError
from llavakit_plugins.huggingface.json_files import (
    Check,
    check,
    is_count,
    is_flag,
    is_text,
    read_json,
    shown,
)
from llavakit_plugins.vision.square import MEAN, RGB, STD, Aspect, Interpolation, Square


class Pixels(NamedTuple):
    """How an image becomes a square, in the terms of the built-in vision encoders' options."""

    aspect: Aspect
    mean: RGB
    std: RGB
    interpolation: Interpolation = "bicubic"


def usual_pixels(model_type: str) -> Pixels:
    """Return the preprocessing that an encoder of this model type uses if a folder states none."""
    if model_type.startswith("siglip"):
        half = (0.5, 0.5, 0.5)
        return Pixels("squash", half, half)
    return Pixels("crop", MEAN, STD)


def read_pixels(folder: Path, edge: int | list[int], usual: Pixels) -> Pixels | None:
    """Return a folder's preprocessing for squares of `edge`; None where it states none.

    Keys that the folder leaves out are taken from `usual`. Raises ModelError for preprocessing that
    no built-in encoder does.
    """
    path = folder / "processor_config.json"  # the newer file wins, as in transformers 5
    table: Any = read_json(path).get("image_processor") if path.is_file() else None
    if not isinstance(table, dict):
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            return None
        table = read_json(path)
    _refuse_others(path, table)
    if isinstance(edge, list):
        if len(set(edge)) != 1:
            raise ModelError(
                f"{folder}: the vision tower's `image_size` is {edge}, which is no square"
            )
        edge = edge[0]
    kind = str(table.get("image_processor_type") or table.get("feature_extractor_type") or "")
    # a missing key means the default of the named processor: CLIP's and LLaVA's crop
    crops = table.get("do_center_crop", kind.startswith(("CLIP", "Llava")))
    size, crop = _edges(table.get("size")), _edges(table.get("crop_size"))
    # what the encoder gets at the end: a crop of the resized image, or the resized image itself
    final = (crop if crops else size) or {edge}
    if final != {edge} or (crops and size not in (None, {edge})):
        raise ModelError(
            f"{path} makes images of {_edges_text(table)}, but the vision tower reads squares of "
            f"{edge}; is it the preprocessing of this model?"
        )
    if table.get("do_pad"):
        aspect: Aspect = "pad"
    else:
        aspect = "crop" if crops else "squash"
    scaled = table.get("do_normalize", True)
    mean, std = colour_of(table, "image_mean", path), colour_of(table, "image_std", path)
    return Pixels(
        aspect,
        # mean 0 and spread 1 leave pixels as they are, which is what `do_normalize: false` means
        (mean or usual.mean) if scaled else (0.0, 0.0, 0.0),
        (std or usual.std) if scaled else (1.0, 1.0, 1.0),
        filter_of(table, path) or "bicubic",
    )


def _refuse_others(path: Path, table: dict[str, Any]) -> None:
    """Raise ModelError for values of a wrong type, and for steps that no encoder here does."""
    check(table, path, _CHECKS)
    for key in ("do_resize", "do_rescale"):
        if table.get(key) is False:
            raise ModelError(
                f"{path} has `{key}` = {table[key]}, which no vision encoder here does; convert "
                "the model with its usual preprocessing"
            )
    factor = table.get("rescale_factor")
    factor = 1 / 255 if factor is None else factor
    if (
        isinstance(factor, bool)
        or not isinstance(factor, int | float)
        or abs(factor - 1 / 255) > 1e-9
    ):
        raise ModelError(
            f"{path} scales pixels by {factor}; vision encoders here scale them by 1/255"
        )


def _is_size(value: Any) -> bool:
    edges = value.values() if isinstance(value, dict) else value
    return is_count(value) or (
        isinstance(value, dict | list) and all(edge is None or is_count(edge) for edge in edges)
    )


_FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad", "do_convert_rgb")
_CHECKS: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(_FLAGS, (is_flag, "true or false")),
    **dict.fromkeys(("size", "crop_size"), (_is_size, "a number of pixels, or a table of some")),
    **dict.fromkeys(("image_processor_type", "feature_extractor_type"), (is_text, "a name")),
}


def _edges(value: Any) -> set[int] | None:
    """Return the edges in a `size`, in any of the forms that versions of transformers wrote."""
    if value is None:
        return None
    if isinstance(value, dict):
        value = [value[k] for k in ("shortest_edge", "height", "width") if value.get(k)]
    return set(value) if isinstance(value, list) else {value}


def _edges_text(table: dict[str, Any]) -> str:
    return f"size {table.get('size')} and crop {table.get('crop_size')}"


def colour_of(table: Mapping[str, Any], key: str, path: Path) -> RGB | None:
    """Return the three numbers under `key` (`image_mean` or `image_std`); None if it is absent.

    Raises ModelError for a value that is not one or three numbers, and for an `image_std` of 0 or
    less, since pixels are divided by it.
    """
    value = table.get(key)
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value] * 3
    fits = len(numbers) == 3 and all(
        isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < _FAR for n in numbers
    )
    if not fits or (key == "image_std" and min(numbers) <= 0):
        more = " above 0" if key == "image_std" else ""
        raise ModelError(f"{path} has `{key}` = {shown(value)}; it must be three numbers{more}")
    return cast(RGB, tuple(map(float, numbers)))


_FAR = 1e6  # far beyond any colour; the comparison also refuses infinity and NaN


def filter_of(table: Mapping[str, Any], path: Path) -> Interpolation | None:
    """Return the filter with which preprocessing resizes; None if it does not say.

    Raises ModelError for a number that is not one of Pillow's filters.
    """
    value = table.get("resample")
    if value is None:
        return None
    if isinstance(value, bool) or value not in range(6):  # True is 1 for Python, and no filter
        raise ModelError(
            f"{path} has `resample` = {shown(value)}; it must be the number of one of Pillow's "
            "filters, 0 to 5"
        )
    return cast(Interpolation, Image.Resampling(value).name.lower())


def make_processor(
    pixels: Square, pinpoints: list[list[int]] | None = None, *, whole: bool = False
) -> Any:
    """Return transformers' image processor that does the same as `pixels`, of the same backend.

    With `pinpoints` it is LLaVA-NeXT's, which cuts images into tiles, or OneVision's, which leaves
    the images of a sample of several `whole`.
    Tiles are always of the PIL backend: what cuts them here resizes with Pillow.
    """
    import transformers

    def processor(name: str, **settings: Any) -> Any:
        ours = "Pil" if pixels.backend == "pil" or pinpoints else ""
        return getattr(transformers, f"{name}ImageProcessor{ours}")(**settings)

    edge = pixels.size
    square = {"height": edge, "width": edge}
    shared: dict[str, Any] = {
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": int(Image.Resampling[pixels.interpolation.upper()]),
    }
    cropped: dict[str, Any] = {"size": {"shortest_edge": edge}, "crop_size": square}
    if pinpoints and whole:
        return processor("LlavaOnevision", image_grid_pinpoints=pinpoints, size=square, **shared)
    if pinpoints:
        return processor("LlavaNext", image_grid_pinpoints=pinpoints, **cropped, **shared)
    if pixels.aspect == "squash":
        return processor("Siglip", size=square, do_center_crop=False, **shared)
    if pixels.aspect == "pad":
        return processor("Llava", do_pad=True, **cropped, **shared)
    return processor("CLIP", **cropped, **shared)
