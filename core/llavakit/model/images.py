"""Opens images of every mode, and names the sample whose image cannot be used."""

from __future__ import annotations

import errno
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from llavakit.contracts.data import ImageSource
from llavakit.contracts.errors import DataError, ModelError
from llavakit.files import explain_write

if TYPE_CHECKING:
    from torch import Tensor

    from llavakit.contracts.networks import VisionEncoder

MAX_PIXELS = 178_956_970
"""Pillow's own limit for a decompression bomb (twice its warning level)."""

ImagePath = Path | str
_READERS, _AT_ONCE = 16, 256  # threads that look at files, and files that each takes at once
_NO_BOMB = 1 << 18  # bytes of a JPEG that cannot hold more pixels than are safe to decode
_ABSENT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class MissingImage(DataError):
    """There is no such image file."""


_UNDECODABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
)  # what Pillow's decoders are known to raise for damaged files


def open_image(source: ImageSource, where: str, edge: int | None = None) -> Image.Image:
    """Return an RGB image; `where` names the sample in errors.

    Animated images give their first frame and 16-bit ones are scaled to 8 bits. As in the original
    LLaVA, transparency is dropped and a camera's orientation note is not applied. With `edge`, a
    JPEG may be decoded at a half, a quarter or an eighth whose shorter side is not below it.

    Raises DataError where the file is missing, truncated, no image, or a decompression bomb.
    """
    if isinstance(source, Image.Image):
        return _rgb(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters about a damaged file is an error below
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"image {source} of {where} has {image.width}x{image.height} pixels, "
                        "more than is safe to decode; shrink it"
                    )
                if edge is not None:
                    short = min(image.size)
                    image.draft(None, (image.width * edge // short, image.height * edge // short))
                image.load()
                return _rgb(image)
    except FileNotFoundError:
        raise MissingImage(
            f"image {source} of {where} does not exist; check the images folder"
        ) from None
    except UnidentifiedImageError:
        raise DataError(
            f"image {source} of {where} is not an image Pillow can read; replace it"
        ) from None
    except Image.DecompressionBombError as error:
        raise DataError(
            f"image {source} of {where} is too large to decode: {error}; shrink it"
        ) from None
    except DataError:
        raise
    except _UNDECODABLE as error:
        raise DataError(
            f"image {source} of {where} cannot be decoded ({error}); it may be truncated: "
            "fetch it again or remove the sample"
        ) from error


def read_pixels(encoder: VisionEncoder, source: ImageSource, where: str) -> Tensor:
    """Return the pixels `[3, H, W]` that a vision encoder reads of an image."""
    pixels_3HW = encoder.prepare(open_image(source, where, encoder.decode_edge))
    expected = (3, encoder.image_size, encoder.image_size)
    if tuple(pixels_3HW.shape) != expected:
        raise ModelError(
            f"vision encoder `{encoder.name}` prepares an image as {tuple(pixels_3HW.shape)}, but "
            f"its `image_size` says {expected}; mend `prepare` or `image_size`"
        )
    return pixels_3HW


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 or 32 bits of grey
        grey = np.asarray(image, dtype=np.float64)
        scale = 257.0 if grey.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.rint(grey / scale).clip(0, 255).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it advises to keep a palette's transparency
        return image.convert("RGB")


def check_image(path: ImagePath, where: str) -> None:
    """Raise DataError where an image is missing, cut short or no image.

    Takes microseconds: a file with the right beginning and end is taken for whole, any other is
    decoded.
    """
    found = _seems_whole(path, where)
    if isinstance(found, DataError):
        raise found
    if not found:
        open_image(Path(path), where)


def whole_images(paths: Iterable[ImagePath]) -> Iterator[bool]:
    """Yield for each file, in order, whether it looks whole; `check_image` judges the others.

    Reads many at once: a disk or a file server that takes milliseconds for one file takes hardly
    longer for sixteen. Holds a few thousand paths at a time.
    """
    remaining = iter(paths)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="whole-images") as pool:
        while window := list(islice(remaining, _READERS * _AT_ONCE)):
            parts = [window[begin : begin + _AT_ONCE] for begin in range(0, len(window), _AT_ONCE)]
            yield from chain.from_iterable(pool.map(_are_whole, parts))


def _are_whole(paths: Sequence[ImagePath]) -> list[bool]:
    return [_seems_whole(path, "") is True for path in paths]


def _seems_whole(path: ImagePath, where: str) -> bool | DataError:
    """Return whether beginning and end of a file are an image's; an error where it is not there.

    Calls the system itself: a file object takes five times as long.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(handle).st_size
            wanted = 24 if size < _NO_BOMB else 1 << 16
            head, tail = os.pread(handle, wanted, 0), os.pread(handle, 32, max(0, size - 32))
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        kind = MissingImage if getattr(error, "errno", None) in _ABSENT else DataError
        return kind(f"image {path} of {where} cannot be read ({reason}); check the images folder")
    if head.startswith(b"\xff\xd8\xff"):
        small = size < _NO_BOMB or _jpeg_pixels(head) <= MAX_PIXELS
        return small and tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
        return width * height <= MAX_PIXELS and tail.endswith(b"IEND\xaeB`\x82")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return size >= 8 + int.from_bytes(head[4:8], "little")
    return False


def _jpeg_pixels(head: bytes) -> float:
    """Return how many pixels a JPEG has; infinity where its beginning does not say."""
    place = 2
    while head[place : place + 1] == b"\xff" and place + 9 <= len(head):
        marker = head[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of a frame
            height, width = struct.unpack_from(">HH", head, place + 5)
            return float(height * width)
        place += 2 + int.from_bytes(head[place + 2 : place + 4])
    return math.inf


def inside(folder: Path, name: str, where: str) -> Path:
    """Return `folder/name`; raise DataError where `name` leaves the folder.

    Links within the folder are its owner's, and may lead elsewhere.
    """
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise DataError(f"image `{name}` of {where} lies outside {folder}; use a path within it")
    return folder / name


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all. Raises LlavaError where that fails."""
    partial = path.with_name(f".{path.name}.partial")
    with explain_write(path):
        try:
            image.save(partial, "png")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def save_thumbnail(source: ImageSource, folder: Path, name: str, edge: int = 384) -> str:
    """Write a small PNG into `folder` and return its name, so that a report keeps its pictures."""
    image = open_image(source, f"the report ({name})")
    image.thumbnail((edge, edge))
    folder.mkdir(exist_ok=True)
    image.save(folder / f"{name}.png")
    return f"{folder.name}/{name}.png"
