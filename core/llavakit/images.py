"""Opens images of every mode, and names the sample whose image cannot be used."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from llavakit.errors import DataError
from llavakit.samples import ImageSource

MAX_PIXELS = 178_956_970
"""Pillow's own limit for a decompression bomb (twice its warning level)."""


def open_image(source: ImageSource, where: str) -> Image.Image:
    """Return an RGB image; `where` names the sample in errors.

    Animated images give their first frame and 16-bit ones are scaled to 8 bits. As in the original
    LLaVA, transparency is dropped and a camera's orientation note is not applied.

    Raises DataError where the file is missing, truncated, no image, or a decompression bomb.
    """
    if isinstance(source, Image.Image):
        return _rgb(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"image {source} of {where} has {image.width}x{image.height} pixels, "
                        "more than is safe to decode; shrink it"
                    )
                image.load()
                return _rgb(image)
    except FileNotFoundError:
        raise DataError(
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
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"image {source} of {where} cannot be decoded ({error}); it may be truncated: "
            "fetch it again or remove the sample"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 or 32 bits of grey
        grey = np.asarray(image, dtype=np.float64)
        scale = 257.0 if grey.max(initial=0) > 255 else 1.0
        image = Image.fromarray((grey / scale).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def inside(folder: Path, name: str, where: str) -> Path:
    """Return `folder/name`; raise DataError where `name` leaves the folder."""
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"image `{name}` of {where} lies outside {folder}; use a path within it")
    return path


def save_thumbnail(source: ImageSource, folder: Path, name: str, edge: int = 384) -> str:
    """Write a small PNG into `folder` and return its name, so that a report keeps its pictures."""
    image = open_image(source, f"the report ({name})")
    image.thumbnail((edge, edge))
    folder.mkdir(exist_ok=True)
    image.save(folder / f"{name}.png")
    return f"{folder.name}/{name}.png"
