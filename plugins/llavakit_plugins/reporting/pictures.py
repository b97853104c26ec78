"""Images of the report: steps write them below the run's folder, pages embed them as data URIs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image, ImageOps

from llavakit import Video, explain_write, open_image
from llavakit.contracts.data import ImageSource
from llavakit_plugins.media import frames
from llavakit_plugins.media.images import open_file

_SIDE = 384  # of an embedded image, in pixels
_SMALL = 128  # shown magnified, so every pixel is kept: PNG


@dataclass(frozen=True)
class Picture:
    """An embedded image, or a note that says why there is none."""

    data: str = ""
    width: int = 0
    height: int = 0
    small: bool = False
    note: str = ""


class Pictures:
    """Finds and embeds the images below a folder."""

    def __init__(self, directory: Path) -> None:
        self._root = directory.resolve()

    def find(self, folder: Path, name: str | None) -> tuple[Path | None, str]:
        """Return the image file `name` of `folder`, or a note that says why there is none."""
        if not name:
            return None, ""
        try:
            # resolved, with its links: a report may be sent to others, and must show no other file
            path = (folder / name).resolve()
            if not path.is_relative_to(self._root):
                return None, "not shown: the image is outside of the run's folder"
            if not path.is_file():
                return None, f"no such image: {name}"
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
            return None, "not shown: this is no path of an image"
        return path, ""

    def link(self, folder: Path, name: str | None) -> str:
        """Return the image's path relative to the run's folder, quoted, or nothing."""
        path, _ = self.find(folder, name)
        return "" if path is None else quote(path.relative_to(self._root).as_posix())

    def embed(self, folder: Path, name: str | None) -> Picture:
        """Return the image as a data URI."""
        path, note = self.find(folder, name)
        if path is None:
            return Picture(note=note)
        facts = path.stat()
        return _embed(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=1024)  # the report is written again after every step
def _embed(path: Path, modified: int, size: int) -> Picture:
    try:
        with open_file(path) as file:
            # lets libjpeg decode at a fraction of the size,
            # several times as fast; other formats ignore it
            file.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            ImageOps.exif_transpose(file, in_place=True)
            image: Image.Image = file
            if image.has_transparency_data:
                image = image.convert("RGBA")
            elif image.mode not in ("L", "RGB"):
                image = image.convert("RGB")
            image.thumbnail((_SIDE, _SIDE))
            data = min(_encodings(image), key=len)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return Picture(note=f"cannot be read as an image: {path.name}")
    return Picture(data, *image.size, small=max(image.size) <= _SMALL)


def _encodings(image: Image.Image) -> Iterator[str]:
    lossless = image.mode == "RGBA" or max(image.size) <= _SMALL
    kinds: list[tuple[str, dict[str, Any]]] = []
    if lossless or image.getcolors(4096):  # a photograph is never smaller as PNG, and slow
        kinds.append(("png", {"optimize": lossless}))
    if not lossless:
        kinds.append(("jpeg", {"quality": 85}))
    for kind, options in kinds:
        buffer = BytesIO()
        image.save(buffer, kind, **options)
        yield f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode('ascii')}"


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
    """Write a small PNG into `folder` and return its name; of a video its first frame.

    A copy, so that a report keeps its images when the originals are moved.
    """
    where = f"the report ({name})"
    image = (
        frames(source, [0], where)[0] if isinstance(source, Video) else open_image(source, where)
    )
    image.thumbnail((edge, edge))
    with explain_write(folder):
        folder.mkdir(exist_ok=True)
    save_image(image, folder / f"{name}.png")
    return f"{folder.name}/{name}.png"
