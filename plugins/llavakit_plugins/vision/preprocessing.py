"""Turns an RGB image into the normalised square that vision transformers read.

The result equals that of transformers' image processors to the last bit, of the PIL backend or the
torchvision backend. They are not used themselves, because they are slower
(tests/benchmarks/images_cpu.py measures both).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from llavakit_plugins.media.thin_images import (
    RGB as RGB,
    pad_to_square as pad_to_square,
    without_ends as without_ends,
)

Aspect = Literal["crop", "pad", "squash"]
Backend = Literal["pil", "torchvision"]
Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

TORCH_FILTERS = ("bilinear", "bicubic")  # those that PyTorch's kernel for bytes has

MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each colour over CLIP's training images; values are 0..1."""
STD: RGB = (0.26862954, 0.26130258, 0.27577711)


class Square(NamedTuple):
    """How an image becomes a square of `size` pixels."""

    size: int
    aspect: Aspect
    mean: RGB
    std: RGB
    interpolation: Interpolation = "bicubic"
    fast: bool = False
    """Whether large images are first shrunk by averaging whole blocks: faster, and not exact."""
    backend: Backend = "pil"
    """Whose pixels they are, to the last bit: transformers' processors have two backends."""


def to_square(image: Image.Image, square: Square) -> Tensor:
    """Return normalised pixels `[3, size, size]`, float32.

    `crop` resizes the shorter side to `size` and takes the middle square, as in CLIP and LLaVA.
    `pad` first puts the image in the middle of a square of the mean colour, as in LLaVA-1.5
    (arXiv 2310.03744). `squash` resizes both sides to `size`, as in SigLIP. Memory is
    limited: an image whose sides have a ratio above 64 is cut before it is resized, or shrunk
    before it is padded.
    """
    size = square.size
    if square.fast:
        image = shrink(image, size)
    if square.aspect == "pad":
        image = pad_to_square(image, square.mean)
    width, height = size, size
    if square.aspect == "crop":
        image = without_ends(image)
        # rounded down, as transformers does
        longest = int(size * max(image.size) / min(image.size))
        width, height = (longest, size) if image.width > image.height else (size, longest)
    left, top = (width - size) // 2, (height - size) // 2
    how = square.interpolation
    # PyTorch's kernel for bytes is twice as fast; its results differ by a level here and there
    if square.backend == "torchvision" or (square.fast and how in TORCH_FILTERS):
        resized_CHW = _resize_bytes(image, width, height, how)
        return _normalise_bytes(
            resized_CHW[:, top : top + size, left : left + size], square.mean, square.std
        )
    image = image.resize((width, height), Image.Resampling[how.upper()])
    image = image.crop((left, top, left + size, top + size))
    return normalise(np.asarray(image), square.mean, square.std)


def _resize_bytes(image: Image.Image, width: int, height: int, how: Interpolation) -> Tensor:
    """Return an image `[3, height, width]`, uint8, as torchvision resizes it."""
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # Pillow's own cannot be shared
    if image.size == (width, height):
        return pixels_CHW
    return functional.interpolate(pixels_CHW[None], (height, width), mode=how, antialias=True)[0]


def _normalise_bytes(pixels_CHW: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Return `normalise` in the order of torchvision's backend: mean and deviation are scaled."""
    scale = 1 / (1 / 255)
    return _floats(pixels_CHW).sub_(_colour(mean) * scale).div_(_colour(std) * scale)


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Return the image averaged over whole blocks; its shorter side stays at least twice `size`.

    A later resize to `size` then reads a fraction of the pixels. On photographs values change by a
    few of 255 levels at most.
    """
    factor = min(image.size) // (2 * size)
    return image.reduce(factor) if factor > 1 else image


def normalise(pixels_HWC: npt.NDArray[np.uint8], mean: RGB, std: RGB) -> Tensor:
    """Return `(pixels / 255 - mean) / std` as `[3, H, W]`, float32."""
    # transformers multiplies by 1/255 in float64 and rounds: for each byte the same bits
    found = _floats(torch.from_numpy(np.array(pixels_HWC)).permute(2, 0, 1)).div_(255)
    return found.sub_(_colour(mean)).div_(_colour(std))


def _floats(pixels_CHW: Tensor) -> Tensor:
    return pixels_CHW.to(torch.float32, memory_format=torch.contiguous_format)


def _colour(values: RGB) -> Tensor:
    return torch.tensor(values)[:, None, None]
