"""Turns an RGB image into the normalised square that vision transformers read.

The result equals that of transformers' image processors to the last bit, of the PIL backend or the
torchvision backend. They are not used themselves, because they are slower
(tests/benchmarks/images_cpu.py measures both).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from llavakit_plugins.media.pixel_memory import pixels_of
from llavakit_plugins.media.resizing import middle_pixels, padded_pixels
from llavakit_plugins.media.thin_images import (
    pad_to_square as pad_to_square,
    without_ends as without_ends,
)
from llavakit_plugins.vision.square import (
    MEAN as MEAN,
    RGB as RGB,
    STD as STD,
    TORCH_FILTERS as TORCH_FILTERS,
    Interpolation,
    Square as Square,
)

_TRIED, _OFF = 8, 1 / 16  # pixels beyond what is kept, and how far off a whole one they may be


def to_square(image: Image.Image, square: Square) -> Tensor:
    """Return normalised pixels `[3, size, size]`, float32.

    `crop` resizes the shorter side to `size` and takes the middle square, as in CLIP and LLaVA.
    `pad` first puts the image in the middle of a square of the mean colour, as in LLaVA-1.5
    (arXiv 2310.03744). `squash` resizes both sides to `size`, as in SigLIP. Memory is
    limited: an image whose sides have a ratio above 64 is cut before it is resized, or shrunk
    before it is padded.
    """
    size, how = square.size, square.interpolation
    if square.fast:
        image = shrink(image, size)
    # PyTorch's kernel for bytes is several times as fast; its results are a level off in places
    by_torch = square.backend == "torchvision" or (square.fast and how in TORCH_FILTERS)
    if square.aspect == "pad" and not by_torch:
        pixels = padded_pixels(image, square.mean, size, Image.Resampling[how.upper()])
        return normalise(pixels, square.mean, square.std)
    if square.aspect == "pad":
        image = pad_to_square(image, square.mean)
    width, height = size, size
    if square.aspect == "crop":
        image = without_ends(image)
        # rounded down, as transformers does
        longest = int(size * max(image.size) / min(image.size))
        width, height = (longest, size) if image.width > image.height else (size, longest)
    if not by_torch:
        pixels = middle_pixels(image, (width, height), size, Image.Resampling[how.upper()])
        return normalise(pixels, square.mean, square.std)
    pixels_CHW = _resize_bytes(image, (width, height), size, how, part=square.fast)
    return _normalise_bytes(pixels_CHW, square.mean, square.std)


def _resize_bytes(
    image: Image.Image, size: tuple[int, int], edge: int, how: Interpolation, *, part: bool
) -> Tensor:
    """Return the middle `[3, edge, edge]`, uint8, of an image as torchvision resizes it to `size`.

    With `part`, not much more than it is resized, which moves it by a fraction of a pixel.
    """
    pixels_CHW = torch.from_numpy(pixels_of(image)).permute(2, 0, 1)
    (width, height), (left, top) = size, ((size[0] - edge) // 2, (size[1] - edge) // 2)
    if part:
        pixels_CHW, left, width = _near_part(pixels_CHW, 2, left, edge, width)
        pixels_CHW, top, height = _near_part(pixels_CHW, 1, top, edge, height)
    if pixels_CHW.shape[1:] != (height, width):
        pixels_CHW = functional.interpolate(
            pixels_CHW[None], (height, width), mode=how, antialias=True
        )[0]
    return pixels_CHW[:3, top : top + edge, left : left + edge]


def _near_part(
    pixels_CHW: Tensor, axis: int, first: int, count: int, resized: int
) -> tuple[Tensor, int, int]:
    """Return a part of the pixels, where in it, resized, the `first` kept is, and its length then.

    Its ends are at most a sixteenth from whole pixels: among a few beyond what is kept the nearest,
    or those of the whole.
    """
    scale = pixels_CHW.shape[axis] / resized

    def off(end: int) -> float:
        return abs(end * scale - round(end * scale))

    start = min(range(max(0, first - _TRIED), first + 1), key=off)
    stop = min(range(first + count, min(resized, first + count + _TRIED) + 1), key=off)
    start, stop = start if off(start) < _OFF else 0, stop if off(stop) < _OFF else resized
    begin, end = round(start * scale), round(stop * scale)
    return pixels_CHW.narrow(axis, begin, end - begin), first - start, stop - start


def _normalise_bytes(pixels_CHW: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Return `normalise` in the order of torchvision's backend: mean and deviation are scaled."""
    scale = 1 / (1 / 255)
    return _floats(pixels_CHW).sub_(_colour(mean, scale)).div_(_colour(std, scale))


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Return the image averaged over whole blocks; its shorter side stays at least twice `size`.

    A later resize to `size` then reads a fraction of the pixels. On photographs values change by a
    few of 255 levels at most.
    """
    factor = min(image.size) // (2 * size)
    return image.reduce(factor) if factor > 1 else image


def normalise(pixels_HWC: npt.NDArray[np.uint8], mean: RGB, std: RGB) -> Tensor:
    """Return `(pixels / 255 - mean) / std` as `[3, H, W]`, float32; of four channels the first."""
    # transformers multiplies by 1/255 in float64 and rounds: for each byte the same bits
    found = _floats(torch.from_numpy(pixels_HWC).permute(2, 0, 1)[:3]).div_(255)
    return found.sub_(_colour(mean)).div_(_colour(std))


def _floats(pixels_CHW: Tensor) -> Tensor:
    return pixels_CHW.to(torch.float32, memory_format=torch.contiguous_format)


@lru_cache(maxsize=64)
def _colour(values: RGB, scale: float = 1.0) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None] * scale
