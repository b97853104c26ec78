"""Image preprocessing as a checkpoint states it, in preprocessor_config.json or within
processor_config.json, and the same written for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image

from llavakit import ModelError
from llavakit_plugins.huggingface.weights import read_json
from llavakit_plugins.vision.preprocessing import MEAN, RGB, STD, Aspect, Interpolation, Square


class Pixels(NamedTuple):
    """How an image becomes a square, as the built-in vision encoders' options say it."""

    aspect: Aspect
    mean: RGB
    std: RGB
    interpolation: Interpolation = "bicubic"


def usual_pixels(model_type: str) -> Pixels:
    """Return what an encoder of this type reads where nothing says so."""
    if model_type.startswith("siglip"):
        half = (0.5, 0.5, 0.5)
        return Pixels("squash", half, half)
    return Pixels("crop", MEAN, STD)


def read_pixels(folder: Path, edge: int, usual: Pixels) -> Pixels | None:
    """Return a folder's preprocessing for squares of `edge`; None where it states none.

    What it leaves out is as `usual`. Raises ModelError for preprocessing that no built-in encoder
    does.
    """
    path = folder / "processor_config.json"
    table: Any = read_json(path).get("image_processor") if path.is_file() else None
    if not isinstance(table, dict):
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            return None
        table = read_json(path)
    _refuse_others(path, table)
    kind = str(table.get("image_processor_type") or table.get("feature_extractor_type") or "")
    crops = table.get("do_center_crop", kind.startswith(("CLIP", "Llava")))
    size, crop = _edges(table.get("size")), _edges(table.get("crop_size"))
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
    filter_number = table.get("resample", int(Image.Resampling.BICUBIC))
    return Pixels(
        aspect,
        _colour(table, "image_mean", usual.mean, path) if scaled else (0.0, 0.0, 0.0),
        _colour(table, "image_std", usual.std, path) if scaled else (1.0, 1.0, 1.0),
        cast(Interpolation, Image.Resampling(filter_number).name.lower()),
    )


def _refuse_others(path: Path, table: dict[str, Any]) -> None:
    wanted = {"do_resize": (True,), "do_rescale": (True,), "resample": (None, *range(6))}
    for key, allowed in wanted.items():
        if table.get(key, allowed[0]) not in allowed:
            raise ModelError(
                f"{path} has `{key}` = {table[key]}, which no vision encoder here does; convert "
                "the model with its usual preprocessing"
            )
    factor = table.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor - 1 / 255) > 1e-9:
        raise ModelError(
            f"{path} scales pixels by {factor}; vision encoders here scale them by 1/255"
        )


def _edges(value: Any) -> set[int] | None:
    """Return the edges that a size names, in any of the ways transformers has written it."""
    if value is None:
        return None
    if isinstance(value, dict):
        value = [value[k] for k in ("shortest_edge", "height", "width") if value.get(k)]
    return set(value) if isinstance(value, list) else {value}


def _edges_text(table: dict[str, Any]) -> str:
    return f"size {table.get('size')} and crop {table.get('crop_size')}"


def _colour(table: dict[str, Any], key: str, usual: RGB, path: Path) -> RGB:
    value = table.get(key, usual)
    if isinstance(value, list | tuple) and len(value) == 3:
        try:
            return cast(RGB, tuple(float(part) for part in value))
        except (TypeError, ValueError):
            pass
    raise ModelError(f"{path} has `{key}` = {value}; it must be three numbers")


def make_processor(pixels: Square) -> Any:
    """Return transformers' image processor that does the same, of the PIL backend."""
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

    edge = pixels.size
    square = {"height": edge, "width": edge}
    shared: dict[str, Any] = {
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": int(Image.Resampling[pixels.interpolation.upper()]),
    }
    if pixels.aspect == "squash":
        return SiglipImageProcessorPil(size=square, do_center_crop=False, **shared)
    shared |= {"size": {"shortest_edge": edge}, "crop_size": square}
    if pixels.aspect == "pad":
        return LlavaImageProcessorPil(do_pad=True, **shared)
    return CLIPImageProcessorPil(**shared)
