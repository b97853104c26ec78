"""Resizes an image with Pillow and keeps its middle, whose bits are those of a whole resize.

Pillow resizes in two passes: the rows first, rounded to bytes, then the columns. Each can be done
by itself, so that what is cut off afterwards need not be computed. Where numba is installed, many
pixels go through loops of our own with the same bits. Without torch, as ONNX needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from math import ceil, floor, gcd
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from llavakit_plugins.media.pixel_memory import pixels_of
from llavakit_plugins.media.thin_images import LONGEST_THIN, RGB, levels, pad_to_square

_log = logging.getLogger("llavakit")

Filter = Image.Resampling
Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

_REACH = {
    Filter.BOX: 0.5,
    Filter.BILINEAR: 1.0,
    Filter.HAMMING: 1.0,
    Filter.BICUBIC: 2.0,
    Filter.LANCZOS: 3.0,
}
"""How far to each side, in pixels of the smaller image, the pixels lie that one is made of."""

_MANY = 100_000_000
"""Pixels of a process until it loads the compiled loops, which takes as long as they then save."""


def resize(image: Image.Image, size: tuple[int, int], how: Filter) -> Image.Image:
    """Return an RGB image resized to `size`, its width and height; as Pillow's `resize`."""
    found_HW3 = _by_loops(image, size, (0, 0, *size), how)
    if found_HW3 is None:
        return _resize(image, size, how)
    return Image.merge("RGB", [Image.fromarray(found_HW3[..., colour]) for colour in range(3)])


def middle_pixels(image: Image.Image, size: tuple[int, int], edge: int, how: Filter) -> Bytes:
    """Return the bytes of `resize_middle`, `[edge, edge, 3]`, or four whose last means nothing."""
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    found_HW3 = _by_loops(image, size, (left, top, left + edge, top + edge), how)
    return pixels_of(resize_middle(image, size, edge, how)) if found_HW3 is None else found_HW3


def padded_pixels(image: Image.Image, mean: RGB, edge: int, how: Filter) -> Bytes:
    """Return the bytes of `pad_and_resize`, as `middle_pixels` does."""
    if loops_for(0) is None:
        return pixels_of(pad_and_resize(image, mean, edge, how))
    return middle_pixels(pad_to_square(image, mean), (edge, edge), edge, how)


def resize_middle(image: Image.Image, size: tuple[int, int], edge: int, how: Filter) -> Image.Image:
    """Return the middle square of `edge` pixels of an RGB image that is resized to `size`.

    Its bits are those of `resize` and `crop`.
    """
    (width, height), (left, top) = size, ((size[0] - edge) // 2, (size[1] - edge) // 2)
    if size == (edge, edge) or min(size) < edge or not _rows_first(image, size):
        return _crop(_resize(image, size, how), (left, top, left + edge, top + edge))
    rows = image.height
    above, below = _used(rows, height, top, edge, how)
    image = _crop(image, (0, above, image.width, below))
    part = _alone(image.width, width, left, edge, how)
    box = part.start, 0, part.stop, image.height
    image = _resize(image, (part.kept, image.height), how, box)
    left -= part.first
    # rows back to where they were: of those that are black now nothing is made
    image = _crop(image, (left, -above, left + edge, rows - above))
    part = _alone(rows, height, top, edge, how)
    image = _resize(image, (edge, part.kept), how, (0, part.start, edge, part.stop))
    top -= part.first
    return _crop(image, (0, top, edge, top + edge))


def pad_and_resize(image: Image.Image, mean: RGB, edge: int, how: Filter) -> Image.Image:
    """Return `pad_to_square` of an RGB image, resized to `edge`, with the same bits."""
    if not image.height < image.width <= LONGEST_THIN or not _splits():
        return _resize(pad_to_square(image, mean), (edge, edge), how)
    # rows of one colour are that in the first pass too, which needs not be done for them
    part = image.resize((edge, image.height), how)
    canvas = Image.new("RGB", (edge, image.width), levels(mean))
    canvas.paste(part, (0, (image.width - image.height) // 2))
    return canvas.resize((edge, edge), how)


class _Resized:
    pixels = 0  #: Of all images so far.


def _by_loops(image: Image.Image, size: tuple[int, int], box: Box, how: Filter) -> Bytes | None:
    """Return a part of the resized image, `[H, W, 3]`; None where Pillow is to do it."""
    if size == image.size:
        return None
    loops = loops_for(image.width * image.height)
    inside = 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]
    if loops is None or not inside or how not in _CURVES or not _rows_first(image, size):
        return None
    return part_by(loops, pixels_of(image), size, box, how).transpose(1, 2, 0)


def loops_for(pixels: int) -> Any:
    """Return the compiled loops once they pay, these pixels included; None without numba."""
    _Resized.pixels += pixels
    return _load() if _Resized.pixels > _MANY else None


def part_by(
    loops: Any,
    pixels_HWC: Bytes,
    size: tuple[int, int],
    box: Box,
    how: Filter,
    short: bool = False,
) -> Bytes:
    """Return a part, `[3, H, W]`, of pixels that are resized to `size`, its width and height.

    Args:
        loops: What `loops_for` gave.
        box: The part's left, upper, right and lower edge.
        how: Bilinear or bicubic.
        short: Whether weights are PyTorch's and not Pillow's.
    """
    if pixels_HWC.shape[2] == 3:
        pixels_HWC = np.pad(pixels_HWC, ((0, 0), (0, 0), (0, 1)))
    words_HW = pixels_HWC.view(np.uint32)[..., 0]
    found_3HW: Bytes = loops.resize_part(words_HW, size, box, _REACH[how], short)
    return found_3HW


def agree(
    loops: Any, resize: Callable[[Bytes, tuple[int, int], Filter], Bytes], short: bool = False
) -> bool:
    """Return whether the loops give the bytes `[H, W, 3]` that `resize` gives, of random ones."""
    noise = np.random.default_rng(0).integers(0, 256, (131, 157, 3), dtype=np.uint8)
    for how in _CURVES:
        for size in ((97, 61), (311, 290)):
            found_3HW = part_by(loops, noise, size, (0, 0, *size), how, short)
            if not np.array_equal(found_3HW.transpose(1, 2, 0), resize(noise, size, how)):
                return False
    return True


@lru_cache(maxsize=1)
def _load() -> Any:
    """Return the compiled loops if numba is there, and if they give the bits of this Pillow."""
    try:
        from llavakit_plugins.media import compiled_resizing as loops

        return loops if agree(loops, _whole) else None
    except ModuleNotFoundError:
        return None
    except Exception as error:  # no folder for what it compiles, or a compiler that fails
        _log.warning("Pillow resizes images, for numba cannot be used: %.300s", error)
        return None


def _whole(pixels_HW3: Bytes, size: tuple[int, int], how: Filter) -> Bytes:
    return np.asarray(Image.fromarray(pixels_HW3).resize(size, how))


def _rows_first(image: Image.Image, size: tuple[int, int]) -> bool:
    """Return whether Pillow resizes rows first; from Pillow 13 it does not for all shapes."""
    fewer, lower = image.width - size[0], image.height - size[1]
    return lower <= max(0, 2 * fewer) and _splits()


@lru_cache(maxsize=1)
def _splits() -> bool:
    """Return whether this Pillow's two passes, one by one, give what it gives at once."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    by_pass = image.resize((30, 48), Filter.BICUBIC).resize((30, 22), Filter.BICUBIC)
    return by_pass.tobytes() == image.resize((30, 22), Filter.BICUBIC).tobytes()


def _crop(image: Image.Image, box: Box) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)


def _resize(
    image: Image.Image,
    size: tuple[int, int],
    how: Filter,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    if size == image.size and box in (None, (0, 0, *size)):
        return image
    return image.resize(size, how, box)


def _used(length: int, resized: int, first: int, count: int, how: Filter) -> tuple[int, int]:
    """Return from where to where `count` pixels from the `first` are made of, a pixel too many."""
    if how not in _REACH:
        return 0, length
    scale = length / resized
    reach = _REACH[how] * max(scale, 1) + 1
    begin, end = (first + 0.5) * scale - reach, (first + count - 0.5) * scale + reach
    return max(0, floor(begin)), min(length, ceil(end))


class _Part(NamedTuple):
    """Pixels of a resized line that `resize` computes by themselves from a part of it, a box."""

    start: float
    stop: float
    first: int
    kept: int


@lru_cache(maxsize=4096)  # images of a data set have few sizes
def _alone(length: int, resized: int, first: int, count: int, how: Filter) -> _Part:
    """Return the shortest such part with `count` pixels from the `first`; else the whole line.

    Pillow takes a box in float32, so that its ends must be such numbers, and computes the centre
    of each pixel from its beginning, in float64: weights are the same only where none of them lies
    so near the middle between two multiples of 1/2^22, to which Pillow rounds them, that another
    rounding of the centre could decide.
    """
    whole = _Part(0, length, 0, resized)
    common = gcd(length, resized)
    step = resized // common
    step //= min(8, step & -step)  # an eighth of a pixel is exact too
    start = first // step * step
    found = -(-(first + count - start) // step) * step
    if how not in _CURVES or found >= resized or start + found > resized:
        return whole
    if _in_doubt(_weights(length, resized, np.arange(start, start + found), how), length):
        return whole
    ends = start * length / resized, (start + found) * length / resized
    return _Part(*ends, start, found)


def _weights(length: int, resized: int, pixels: npt.NDArray[np.int64], how: Filter) -> Floats:
    """Return the weights `[pixels, taps]` with which Pillow makes pixels of a resized line."""
    scale = length / resized
    wider = max(scale, 1)
    centres = (pixels[:, None] + 0.5) * scale
    reach = ceil(_REACH[how] * wider) + 1
    taps = np.floor(centres) + np.arange(-reach, reach + 1)
    weights = _CURVES[how](np.abs(taps + 0.5 - centres) / wider)
    weights[(taps < 0) | (taps >= length)] = 0
    found: Floats = weights / weights.sum(1, keepdims=True)
    return found


def _in_doubt(weights: Floats, length: int) -> bool:
    """Return whether another rounding of a centre could change a weight as Pillow rounds it."""
    steps = weights * 2**22
    apart = np.abs(steps - np.floor(steps) - 0.5)
    return bool((apart < length * 2.0**-24).any())  # many times the error of a centre


def _bilinear(x: Floats) -> Floats:
    return np.maximum(1 - x, 0)


def _bicubic(x: Floats) -> Floats:
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


_CURVES = {Filter.BILINEAR: _bilinear, Filter.BICUBIC: _bicubic}
"""Filters that are 0 at their ends: it is the same then whether a pixel there counts."""
