"""From an RGB image to the normalised square that CLIP-like encoders read."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each colour over CLIP's training images, of values 0..1."""
STD = (0.26862954, 0.26130258, 0.27577711)


class Square(NamedTuple):
    """How an image becomes a square of `size` pixels."""

    size: int
    aspect: Literal["crop", "pad"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def to_square(image: Image.Image, square: Square) -> Tensor:
    """Return normalised pixels `[3, size, size]`, float32.

    As in the original LLaVA: bicubic to the shortest side, then the middle square; with `pad` the
    image is first laid centred on a square of the mean colour.
    """
    if square.aspect == "pad" and image.width != image.height:
        edge = max(image.size)
        colour = tuple(int(255 * value) for value in square.mean)
        canvas = Image.new("RGB", (edge, edge), colour)
        canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
        image = canvas
    scale = square.size / min(image.size)
    if min(image.size) != square.size:
        longest = int(max(image.size) * scale)
        wide = image.width >= image.height
        size = (longest, square.size) if wide else (square.size, longest)
        image = image.resize(size, Image.Resampling.BICUBIC)
    top, left = (image.height - square.size) // 2, (image.width - square.size) // 2
    image = image.crop((left, top, left + square.size, top + square.size))
    pixels_HWC = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
    mean, std = np.asarray(square.mean, np.float32), np.asarray(square.std, np.float32)
    return torch.from_numpy(((pixels_HWC - mean) / std).transpose(2, 0, 1).copy())
