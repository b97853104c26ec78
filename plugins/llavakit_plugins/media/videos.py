"""Videos: what a header says, and the frames that are asked for. Errors are DataError."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image

from llavakit import Clip, DataError, ImageSource, Video
from llavakit.contracts.data import ImageFile
from llavakit_plugins.media import video_files
from llavakit_plugins.media.addresses import embedded, is_embedded, local_path
from llavakit_plugins.media.images import (
    MissingImage,
    image_size,
    open_image,
    refusal,
)

FRAMES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"))
"""Suffixes of the files of a folder that are frames."""
MAX_FRAMES = 1_000_000  #: Of a video: nine hours at 30 a second.
MAX_PIXELS = 500_000_000_000  #: Decoded of a file up to the last frame asked for: 2 hours of 1080p.


class _State(NamedTuple):
    """What changes when a file or a folder does."""

    size: int
    changed: int


def clip(video: Video, where: str, upright: bool = False) -> Clip:
    """Return size, number of frames and rate: from the header, where it says all of them.

    The size is that of upright frames if asked so: turned as the camera noted, see `frames`.
    """
    found, name = _source(video, where)
    if isinstance(found, Path):
        state = found.stat()
        known = _State(state.st_size, state.st_mtime_ns)
        try:
            return _clip_of(found, known, upright)
        except DataError:  # once more, with the sample's name, which the cache does not know
            return _clip_of.__wrapped__(found, known, upright, name, where)
    if isinstance(found, bytes):
        return _checked(video_files.clip(found, name, upright), name)
    width, height = image_size(found[0], where, upright=upright)
    return _checked(Clip(width, height, len(found), 0.0), name)


def frames(video: Video, kept: Sequence[int], where: str, upright: bool = False) -> list[Image]:
    """Return frames by their numbers, ascending, as RGB images.

    What a camera noted of how it was held (a display matrix in a file, EXIF in images) is applied
    if `upright`, as to images.
    """
    found, name = _source(video, where)
    if isinstance(found, Path) and found.is_dir():
        found = _images_of(found, name)
    if isinstance(found, Path | bytes):
        # bytes, of a shard or an address, are not fetched again
        header = clip(video if isinstance(found, Path) else Video(found), where)
        decoded = (kept[-1] + 1) * header.width * header.height if kept else 0
        if decoded > MAX_PIXELS:
            raise DataError(
                f"{name} has {header.width}x{header.height} pixels in each of {header.frames} "
                "frames, more than is safe to decode; cut or shrink it"
            )
        return video_files.frames(found, kept, header.frames, name, upright)
    try:
        return [open_image(found[number], where, upright=upright) for number in kept]
    except IndexError:
        raise DataError(f"{name} has {len(found)} frames, fewer than before") from None


def check_video(video: Video, where: str, *, thorough: bool = False) -> None:
    """Raise DataError for a video that cannot be used.

    A file is read to its end, and decoded only if `thorough`; of a folder every frame is looked at.
    """
    header = clip(video, where)
    found, name = _source(video, where)
    if isinstance(found, Path) and found.is_dir():
        found = _images_of(found, name)
    if isinstance(found, Path | bytes):
        if thorough:
            frames(video, [header.frames - 1], where)
        else:
            video_files.check(found, header.frames, name)
        return
    for image in found:
        open_image(image, where) if thorough else image_size(image, where)


def _source(video: Video, where: str) -> tuple[Path | bytes | Sequence[ImageSource], str]:
    """Return a path, the bytes of a file, or frames; and a name for errors."""
    source: Any = video.source
    if isinstance(source, Video):
        return _source(source, where)
    if isinstance(source, ImageFile) and not isinstance(source, Path):
        return source.read_bytes(), f"video {source!s:.1000} of {where}"
    if isinstance(source, str):
        try:
            source = embedded(source) if is_embedded(source) else local_path(source)
        except ValueError as error:
            raise DataError(
                f"the video of {where} is no address of base64 ({error}); fix it"
            ) from None
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise DataError(f"the video of {where} is empty; replace it")
        return bytes(source), f"the video of {where}"
    if isinstance(source, str | Path):
        path, name = Path(source), f"video {source!s:.1000} of {where}"
        if os.path.exists(path):
            return path, name
        missing = MissingImage(f"{name} does not exist; check the folder of videos")
        missing.remedy = "check the folder of videos"
        raise missing
    try:
        frames = tuple(source)  # also of an array [F, H, W, 3], or a tensor [F, 3, H, W]
    except TypeError:
        frames = ()
    if not frames:
        raise DataError(f"the video of {where} has no frames; give a file, a folder, or images")
    return frames, f"the video of {where}"


@lru_cache(maxsize=4096)
def _clip_of(path: Path, state: _State, upright: bool, name: str = "", where: str = "") -> Clip:
    if path.is_dir():
        images = _images_of(path, name)
        return _checked(
            Clip(*image_size(images[0], where, upright=upright), len(images), 0.0), name
        )
    if not path.is_file():
        raise DataError(f"{name} is a device or a pipe; name a video file, or a folder of frames")
    if not state.size:
        raise DataError(f"{name} is empty; fetch it again or remove the sample")
    return _checked(video_files.clip(path, name, upright), name)


def _images_of(folder: Path, name: str) -> list[ImageSource]:
    """Return the frames of a folder in the natural order of their names: 9 in front of 10."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror}; check the folder and its rights"
        ) from error
    found = sorted((one for one in names if Path(one).suffix.lower() in FRAMES), key=_natural)
    if not found:
        raise DataError(f"{name} is a folder without images; put the frames there, or remove it")
    return [folder / one for one in found]


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", name)
    # text and numbers take turns, so that none is compared with the other
    ordered = [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
    return ordered, name


def _checked(clip: Clip, name: str) -> Clip:
    """Return a clip. Raises DataError where it has no frames, or too many."""
    if not clip.frames:
        raise DataError(f"{name} has no frames; fetch it again or remove the sample")
    if reason := refusal(clip.width, clip.height):
        raise DataError(f"{name} {reason}")
    if clip.frames > MAX_FRAMES:
        raise DataError(f"{name} has {clip.frames} frames, more than {MAX_FRAMES}; cut it")
    return clip
