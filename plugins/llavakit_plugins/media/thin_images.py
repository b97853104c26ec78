"""Keeps thin images small before they are resized or padded; without torch, as ONNX needs it."""

from __future__ import annotations

from math import isqrt

from PIL import Image

from llavakit_plugins.media import MAX_PIXELS

RGB = tuple[float, float, float]

_THIN = 64  # times as long as wide: resized or padded, such an image would be huge
LONGEST_THIN = 4096  #: Pixels of a thin image's longer side that are padded to a square.


def _is_thin(image: Image.Image) -> bool:
    return max(image.size) > _THIN * min(image.size)


def without_ends(image: Image.Image) -> Image.Image:
    """Return the middle of a thin image, far more of it than a square crop reads."""
    if not _is_thin(image):
        return image
    most = _THIN * min(image.size)
    width, height = (min(edge, most + (edge - most) % 2) for edge in image.size)  # the same middle
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad_to_square(image: Image.Image, mean: RGB) -> Image.Image:
    """Return the image centred on a square of the mean colour, its longer side kept.

    Where the square would have more pixels than are safe, the image is first averaged over blocks.
    """
    if image.width == image.height:
        return image
    most = LONGEST_THIN if _is_thin(image) else isqrt(MAX_PIXELS)
    if max(image.size) > most:
        image = image.reduce(-(-max(image.size) // most))
    edge = max(image.size)
    canvas = Image.new("RGB", (edge, edge), levels(mean))
    canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return canvas


def levels(mean: RGB) -> tuple[int, ...]:
    """Return a colour of 0..1 in bytes."""
    return tuple(int(255 * value) for value in mean)  # int, not round: as in the original LLaVA
