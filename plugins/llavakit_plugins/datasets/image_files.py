"""Checks image files without decoding them: their headers, and whether they are complete.

A file with an unusual beginning or end is decoded, and Pillow decides.
"""

from __future__ import annotations

import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Protocol, runtime_checkable

from llavakit import DataError, ImageSource, Video, open_image
from llavakit_plugins.datasets.offsets import open_file, read_at
from llavakit_plugins.media import check_video, refusal

ImagePath = Path | str
Read = Callable[[int, int], bytes]
"""Returns so many bytes of a file from an offset; fewer at its end."""


@runtime_checkable
class PartlyRead(Protocol):
    """An image's file of which parts can be read."""

    @property
    def length(self) -> int:
        """In bytes."""

    def read(self, start: int, count: int) -> bytes:
        """Return so many bytes from an offset; fewer at the end."""


Size = tuple[int, int]
"""Width and height in pixels."""

_READERS = 16  # threads that look at files
_AT_ONCE, _DECODED_AT_ONCE = 256, 4  # files that each takes at once
_HEAD, _TAIL = 1024, 32  # bytes that are read at once
_SEGMENTS = 1000  # of a JPEG, or chunks of a PNG, in front of its pixels: fewer than these
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits a channel by colour type."""


def inside(folder: Path, name: str, where: str, what: str = "image") -> Path:
    """Return `folder/name`. Raises DataError if `name` leaves the folder.

    Symbolic links within the folder may lead elsewhere: its owner made them.
    """
    # by the text alone: to resolve the links of a million paths would take minutes
    leaves = os.pardir in name and os.path.normpath(name).split(os.sep)[0] == os.pardir
    if leaves or os.path.isabs(name):
        raise DataError(
            f"{what} `{name:.1000}` of {where} lies outside {folder}; use a path within it"
        )
    return _joined(folder, name)


@lru_cache(maxsize=64)  # rows about one image often stand together
def _joined(folder: Path, name: str) -> Path:
    return folder / name


def check_image(image: ImageSource, where: str) -> None:
    """Raise DataError if an image or a video is missing, cut short, too large, or none.

    Takes microseconds: a file with the right beginning and end, or the bytes of one, counts as
    complete; any other is decoded.
    """
    if isinstance(image, Video):
        check_video(image, where)
        return
    if isinstance(image, bytes):
        whole = _is_whole(image, image[-_TAIL:], len(image), lambda at, n: image[at : at + n])
    elif isinstance(image, PartlyRead):
        whole = seems_whole(image)
    else:
        whole = isinstance(image, Path | str) and _seems_whole(image)
    if not whole:
        open_image(image, where)


def seems_whole(image: PartlyRead) -> bool:
    """Return whether beginning and end of an image's file are those of a usable image."""
    head, tail = image.read(0, _HEAD), image.read(max(0, image.length - _TAIL), _TAIL)
    return _is_whole(head, tail, image.length, _behind(head, image.read))


def whole_images(paths: Iterable[ImagePath], *, thorough: bool = False) -> Iterator[bool]:
    """Yield for each file, in order, whether it looks complete; `check_image` decides the others.

    Reads many files at once: a disk or a file server that takes milliseconds for one file takes
    hardly longer for sixteen. Holds a few thousand paths at a time. With `thorough`, every file is
    decoded to its last pixel, on all cores.
    """
    remaining = iter(paths)
    readers = (os.cpu_count() or 1) if thorough else _READERS
    many = _DECODED_AT_ONCE if thorough else _AT_ONCE
    look = _can_be_decoded if thorough else _seems_whole
    while window := list(islice(remaining, readers * many)):
        parts = [window[begin : begin + many] for begin in range(0, len(window), many)]
        # threads of this window alone: whoever stops reading leaves none behind
        with warnings.catch_warnings(), ThreadPoolExecutor(readers, "whole-images") as pool:
            warnings.simplefilter("ignore")  # what each thread silences must not become loud again
            found = list(pool.map(partial(_each, look), parts))
        yield from chain.from_iterable(found)


def _each(look: Callable[[ImagePath], bool], paths: Sequence[ImagePath]) -> list[bool]:
    return [look(path) for path in paths]


def _can_be_decoded(path: ImagePath) -> bool:
    try:
        open_image(Path(path), "")
    except DataError:
        return False
    return True


def _seems_whole(path: ImagePath) -> bool:
    """Return whether the beginning and the end of a file are those of a usable image.

    Uses system calls, because a Python file object takes five times as long.
    """
    try:
        handle = open_file(path)
        try:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                return False
            head = read_at(handle, _HEAD, 0)
            tail = read_at(handle, _TAIL, max(0, state.st_size - _TAIL))
            read = _behind(head, lambda start, count: read_at(handle, count, start))
            return _is_whole(head, tail, state.st_size, read)
        finally:
            os.close(handle)
    except (OSError, ValueError):  # ValueError: no name that a file may have
        return False


def _behind(head: bytes, read: Read) -> Read:
    """Return what reads a file whose beginning was read."""

    def found(start: int, count: int) -> bytes:
        within = head[start : start + count]
        return within if len(within) == count else read(start, count)

    return found


def _is_whole(head: bytes, tail: bytes, length: int, read: Read) -> bool:
    """Return whether beginning and end, of so many bytes, are those of a usable image."""
    size, whole = None, False
    if head.startswith(b"\xff\xd8\xff"):
        # some programs fill the file up with zeros behind the end mark
        size, whole = _jpeg_size(read), tail.rstrip(b"\0").endswith(b"\xff\xd9")
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        size, whole = _png_size(read), tail.endswith(b"\0\0\0\0IEND\xaeB`\x82")
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        whole = length >= 8 + int.from_bytes(head[4:8], "little")
        size = _webp_size(head[:_HEAD])
    return whole and size is not None and refusal(*size) is None


def _jpeg_size(read: Read) -> Size | None:
    """Return the size of a JPEG of 8 bits, if pixels follow the header."""
    start, size = 2, None
    for _ in range(_SEGMENTS):
        segment = read(start, 10)
        if len(segment) < 10 or segment[0] != 0xFF:
            return None
        marker = segment[1]
        if marker == 0xDA:  # start of the pixels
            return size
        if marker in (0xC0, 0xC1, 0xC2):  # a frame, baseline or progressive
            if size is not None or segment[4] != 8 or segment[9] not in (1, 3, 4):
                return None
            size = int.from_bytes(segment[7:9]), int.from_bytes(segment[5:7])
        elif not (0xE0 <= marker <= 0xEF or marker in (0xC4, 0xDB, 0xDD, 0xFE)):
            return None  # neither a note nor a table
        start += 2 + int.from_bytes(segment[2:4])
    return None


def _png_size(read: Read) -> Size | None:
    """Return the size of a PNG whose chunks in front of its pixels are undamaged."""
    start, size, colours, palette = 8, None, 0, False
    for _ in range(_SEGMENTS):
        length, kind = int.from_bytes(read(start, 4)), read(start + 4, 4)
        if kind == b"IDAT":
            return size if length and (palette or colours != 3) else None
        # IHDR comes first and once; a larger chunk in front of the pixels is left to Pillow
        if (kind == b"IHDR") != (size is None) or length > 1 << 20:
            return None
        content = read(start + 4, length + 8)
        if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:]):
            return None
        if kind == b"IHDR":
            depth, colours, *methods = content[12:17]
            if length != 13 or depth not in _PNG_DEPTHS.get(colours, ()):
                return None
            if methods not in ([0, 0, 0], [0, 0, 1]):  # compression, filter, interlace
                return None
            size = int.from_bytes(content[4:8]), int.from_bytes(content[8:12])
        palette |= kind == b"PLTE"
        start += length + 12
    return None


def _webp_size(head: bytes) -> Size | None:
    """Return the size of a WebP: lossy, lossless or extended."""
    kind, content = head[12:16], head[20:30]
    length, rest = (int.from_bytes(head[i : i + 4], "little") for i in (16, 4))
    whole = rest == 12 + length + length % 2  # nothing but pixels
    if len(content) < 10 or not (whole or (kind == b"VP8X" and length == 10)):
        return None
    # RFC 6386 has the layout of VP8, RFC 9649 those of VP8L and VP8X
    if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a" and not content[0] & 1:
        width, height = (int.from_bytes(content[i : i + 2], "little") & 0x3FFF for i in (6, 8))
        return width, height
    if kind == b"VP8L" and content[0] == 0x2F and not content[4] >> 5:
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8X":
        width, height = (int.from_bytes(content[i : i + 3], "little") for i in (4, 7))
        return 1 + width, 1 + height
    return None
