"""Finds out how a vision encoder prepares images, by trying all ways that clients support."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llavakit import ModelError
from llavakit_plugins.checkpoints.parity import sample_images
from llavakit_plugins.onnx.runtime.pictures import RESAMPLES, Preparation
from llavakit_plugins.vision.preprocessing import Square

if TYPE_CHECKING:
    from llavakit import VisionEncoder

_NUMBERS = {name: int(filter) for name, filter in RESAMPLES.items()}
"""The filters by name, with the numbers that image processors use."""
_CLOSE = 1e-4  # largest difference of a normalised pixel
_LEVELS = 2  # of 255 between two ways to resize bytes with one filter; other filters differ by more
_log = logging.getLogger("llavakit")


def find_preparation(vision: VisionEncoder) -> Preparation:
    """Return the preparation that gives the same pixels as the encoder's own `prepare`.

    Of an encoder whose pixels are not Pillow's (its `fast`, or `backend = "torchvision"`), those of
    Pillow that are nearest, with a warning: no client has another way. Raises ModelError if none
    that clients support does.
    """
    size = vision.image_size
    flat = [Image.new("RGB", (size, size), (level,) * 3) for level in (0, 255)]
    # a black and a white image show what is subtracted and divided: pixel = (value - mean) / std
    black, white = (vision.prepare(image).float().numpy()[:, 0, 0] for image in flat)
    std = 1.0 / (white - black)
    mean = -black * std
    known = _rounded(mean), _rounded(std)
    # one wide and one high image: a crop, a padding and a filter all show in them
    tries = sample_images()
    expected = [vision.prepare(image).float().numpy() for image in tries]
    close = _CLOSE
    square = getattr(vision, "square", None)
    if isinstance(square, Square) and (square.fast or square.backend != "pil"):
        close = _LEVELS / 255 / min(known[1])
        _log.warning(
            "vision encoder `%s` prepares images with PyTorch's resize; clients of the ONNX folder "
            "do it with Pillow's, whose pixels differ by up to %d of 255 levels",
            vision.name, _LEVELS,
        )  # fmt: skip
    for candidate in _candidates(size, *known):
        got = [candidate.prepare(image) for image in tries]
        if all(
            g.shape == e.shape and np.abs(g - e).max() <= close
            for g, e in zip(got, expected, strict=True)
        ):
            return candidate
    raise ModelError(
        f"vision encoder `{vision.name}` prepares images in a way that no client of the ONNX "
        "folder can repeat: not by cropping, padding or squashing to a square with Pillow's "
        "filters; give its `prepare` one of these"
    )


def _rounded(values: Any) -> tuple[float, float, float]:
    """Return the numbers as someone wrote them: with the fewest digits that give the same value."""

    def shortest(value: float) -> float:
        tries = (float(f"{value:.{digits}g}") for digits in range(1, 9))
        return next((number for number in tries if abs(number - value) < 3e-7), value)

    red, green, blue = (shortest(float(value)) for value in values)
    return red, green, blue


def _candidates(
    size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Iterator[Preparation]:
    for aspect, resample in product(("crop", "pad", "squash"), RESAMPLES):
        yield Preparation.model_validate(
            {"size": size, "aspect": aspect, "resample": resample, "resized": size,
             "mean": mean, "std": std}
        )  # fmt: skip
    # timm resizes to a larger square and crops within it
    for resample, extra in product(RESAMPLES, range(1, size // 2)):
        yield Preparation.model_validate(
            {"size": size, "aspect": "crop", "resample": resample, "resized": size + extra,
             "mean": mean, "std": std}
        )  # fmt: skip


def python_settings(preparation: Preparation) -> dict[str, Any]:
    """Return the preparation as configuration of transformers' image processor."""
    size = preparation.size
    settings = _settings(preparation, _NUMBERS[preparation.resample])
    if preparation.aspect == "pad":
        settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        settings |= {"size": {"shortest_edge": size}, "do_center_crop": True}
    return settings


def javascript_settings(preparation: Preparation) -> dict[str, Any]:
    """Return the preparation as configuration of transformers.js' image processor.

    Its bicubic filter has no antialiasing, so its Lanczos is closer to Pillow's bicubic when large
    images are made smaller. It pads after the resize and not before.
    """
    size = preparation.size
    number = _NUMBERS[preparation.resample]
    settings = _settings(
        preparation, _NUMBERS["lanczos"] if preparation.resample == "bicubic" else number
    )
    if preparation.aspect == "pad":
        settings |= {"image_processor_type": "VLMImageProcessor", "image_size": size}
        settings |= {"size": {"longest_edge": size}, "do_center_crop": False}
        settings["background_color"] = [int(255 * value) for value in preparation.mean]
    return settings


def _settings(preparation: Preparation, resample: int) -> dict[str, Any]:
    size = preparation.size
    square = {"height": size, "width": size}
    squash = preparation.aspect == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": preparation.resized},
        "resample": resample,
        "do_center_crop": preparation.aspect == "crop",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preparation.mean),
        "image_std": list(preparation.std),
    }
