"""From an RGB image to the normalised square that vision transformers read.

Equal, to the last bit, to transformers' image processors of the PIL backend.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from llavakit_plugins.vision.thin_images import (
    RGB as RGB,
    pad_to_square as pad_to_square,
    without_ends as without_ends,
)

Aspect = Literal["crop", "pad", "squash"]
Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each colour over CLIP's training images, of values 0..1."""
STD: RGB = (0.26862954, 0.26130258, 0.27577711)


class Square(NamedTuple):
    """How an image becomes a square of `size` pixels."""

    size: int
    aspect: Aspect
    mean: RGB
    std: RGB
    interpolation: Interpolation = "bicubic"
    fast: bool = False
    """Shrink large images by averaging whole blocks first."""


def to_square(image: Image.Image, square: Square) -> Tensor:
    """Return normalised pixels `[3, size, size]`, float32.

    `crop` brings the shorter side to `size` and takes the middle square, as CLIP and the paper do;
    `pad` lays the image centred on a square of the mean colour first, as LLaVA-1.5 does; `squash`
    brings both sides to `size`, as SigLIP does. Memory is bounded: an image more than 64 times as
    long as wide is cut before it is resized, or made smaller before it is padded.
    """
    size = square.size
    if square.fast:
        image = shrink(image, size)
    if square.aspect == "pad":
        image = pad_to_square(image, square.mean)
    width, height = size, size
    if square.aspect == "crop":
        image = without_ends(image)
        longest = int(size * max(image.size) / min(image.size))
        width, height = (longest, size) if image.width > image.height else (size, longest)
    image = image.resize((width, height), Image.Resampling[square.interpolation.upper()])
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return normalise(np.asarray(image), square.mean, square.std)


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Return the image, averaged over whole blocks down to no less than twice `size`.

    A resize to `size` after it reads a fraction of the pixels. On photographs no value moves by
    more than a few of 255 levels.
    """
    factor = min(image.size) // (2 * size)
    return image.reduce(factor) if factor > 1 else image


def normalise(pixels_HWC: npt.NDArray[np.uint8], mean: RGB, std: RGB) -> Tensor:
    """Return `(pixels / 255 - mean) / std` as `[3, H, W]`, float32.

    A byte has 256 values: they are looked up, which is exact and faster than the arithmetic.
    """
    table = _table(mean, std)
    height, width, _ = pixels_HWC.shape
    found = np.empty((3, height, width), np.float32)
    for colour in range(3):
        np.take(table[colour], pixels_HWC[..., colour], out=found[colour], mode="clip")
    return torch.from_numpy(found)


@lru_cache(maxsize=16)
def _table(mean: RGB, std: RGB) -> npt.NDArray[np.float32]:
    """Return what becomes of each byte, `[3, 256]`."""
    values = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]  # rounded as transformers do
    scaled = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.T, np.float32)
