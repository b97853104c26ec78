"""Turns an RGB image into the normalised square that vision transformers read.

The result equals that of transformers' image processors to the last bit, of the PIL backend or the
torchvision backend. They are not used themselves, because they are slower
(tests/benchmarks/images_cpu.py measures both).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from llavakit_plugins.media.pixel_memory import pixels_of
from llavakit_plugins.media.resizing import agree, loops_for, middle_pixels, padded_pixels, part_by
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

Bytes = npt.NDArray[np.uint8]

_LESS = 10  # times less of PyTorch's time than of Pillow's is saved by the loops
_FEW = 4  # times fewer rows are made by the loops; of more, PyTorch makes them as fast
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
    pixels_HWC = pixels_of(image)
    (width, height), (left, top) = size, ((size[0] - edge) // 2, (size[1] - edge) // 2)
    if part:
        pixels_HWC, left, width = _near_part(pixels_HWC, 1, left, edge, width)
        pixels_HWC, top, height = _near_part(pixels_HWC, 0, top, edge, height)
    size, box = (width, height), (left, top, left + edge, top + edge)
    rows, columns = pixels_HWC.shape[:2]
    if (columns, rows) != size and rows < _FEW * height:
        loops = loops_for(rows * columns // _LESS)
        if loops is not None and _agree(loops):
            filtered = Image.Resampling[how.upper()]
            return torch.from_numpy(part_by(loops, pixels_HWC, size, box, filtered, short=True))
    return _resize(pixels_HWC, size, how)[:, box[1] : box[3], box[0] : box[2]]


@lru_cache(maxsize=1)
def _agree(loops: Any) -> bool:
    """Return whether the loops have the bits of this PyTorch on this CPU."""

    def by_torch(pixels_HW3: Bytes, size: tuple[int, int], how: Image.Resampling) -> Bytes:
        return _resize(pixels_HW3, size, how.name.lower()).permute(1, 2, 0).numpy()

    return agree(loops, by_torch, short=True)


def _resize(pixels_HWC: Bytes, size: tuple[int, int], how: str) -> Tensor:
    """Return the three colours `[3, H, W]` of pixels as PyTorch resizes them."""
    pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
    if pixels_CHW.shape[1:] != size[::-1]:
        resized = functional.interpolate(pixels_CHW[None], size[::-1], mode=how, antialias=True)
        pixels_CHW = resized[0]
    return pixels_CHW[:3]


def _near_part(
    pixels_HWC: Bytes, axis: int, first: int, count: int, resized: int
) -> tuple[Bytes, int, int]:
    """Return a part of the pixels, where in it, resized, the `first` kept is, and its length then.

    Its ends are at most a sixteenth from whole pixels: among a few beyond what is kept the nearest,
    or those of the whole.
    """
    scale: float = pixels_HWC.shape[axis] / resized

    def off(end: int) -> float:
        return abs(end * scale - round(end * scale))

    start = min(range(max(0, first - _TRIED), first + 1), key=off)
    stop = min(range(first + count, min(resized, first + count + _TRIED) + 1), key=off)
    start, stop = start if off(start) < _OFF else 0, stop if off(stop) < _OFF else resized
    begin, end = round(start * scale), round(stop * scale)
    kept = pixels_HWC[begin:end] if axis == 0 else pixels_HWC[:, begin:end]
    return kept, first - start, stop - start


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


def normalise(pixels_HWC: Bytes, mean: RGB, std: RGB) -> Tensor:
    """Return `(pixels / 255 - mean) / std` as `[3, H, W]`, float32; of four channels the first."""
    # transformers multiplies by 1/255 in float64 and rounds: for each byte the same bits
    found = _floats(torch.from_numpy(pixels_HWC).permute(2, 0, 1)[:3]).div_(255)
    return found.sub_(_colour(mean)).div_(_colour(std))


def _floats(pixels_CHW: Tensor) -> Tensor:
    return pixels_CHW.to(torch.float32, memory_format=torch.contiguous_format)


@lru_cache(maxsize=64)
def _colour(values: RGB, scale: float = 1.0) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None] * scale
