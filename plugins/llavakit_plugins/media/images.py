"""Opens images of every mode: files, addresses, bytes and pixels in memory."""

from __future__ import annotations

import errno
import os
import re
import stat
import warnings
from io import BytesIO
from pathlib import Path
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from llavakit import DataError, ImageSource
from llavakit.contracts.data import ImageFile
from llavakit_plugins.media.addresses import embedded, is_embedded, local_path

MAX_PIXELS = 178_956_970  #: Pillow's own limit for a decompression bomb (twice its warning level).
MAX_RATIO = 200  #: Of the sides, as Qwen2-VL has it: a resize makes thin images huge.

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_ADDRESS = re.compile(r"(?:^|/)(?:https?|ftps?|s3|gs|hdfs|file|data):", re.IGNORECASE)
_BEYOND = 0.25  # of floats from 0 to 1, as a resize by curves goes beyond at edges
_ROWS = 256  # of a grey image of many bits that are scaled at once
_BITS, _SAMPLE_FORMAT, _SIGNED = 258, 339, 2  # tags of a TIFF, and a value of the second
_ORIENTATION = 274  # the tag of a camera's note; above 4 its sides are exchanged


class PostScriptError(UnidentifiedImageError):
    """An image is PostScript: a program, which Pillow would have Ghostscript run."""


class MissingImage(DataError):
    """There is no such image file."""

    remedy = "check the images folder"


def open_image(
    source: ImageSource, where: str, edge: int | None = None, *, upright: bool = False
) -> Image.Image:
    """Return an RGB image; `where` names the sample in errors.

    Animated images give their first frame. Greys of more than 8 bits are scaled from the range of
    the file's bits, or else of their type; floats from 0..1. As in the original LLaVA, transparency
    is dropped; a camera's orientation note (EXIF) is applied if `upright`, not by default. With
    `edge`, a JPEG may be decoded at a half, a quarter or an eighth whose shorter side is not below.

    Raises DataError where the file is missing, truncated, no image, a decompression bomb, or many
    times as long as wide.
    """
    opened, name = _opened(source, where)
    if opened is source:
        return _decode(opened, name, None, upright)
    with opened:
        return _decode(opened, name, edge, upright)


def image_size(source: ImageSource, where: str, *, upright: bool = False) -> tuple[int, int]:
    """Return the width and height that `open_image` gives, from the header alone; as it raises."""
    opened, name = _opened(source, where)
    (width, height), turned = opened.size, upright and opened.getexif().get(_ORIENTATION, 1) > 4
    if opened is not source:
        opened.close()
    if reason := refusal(width, height):
        raise DataError(f"{name} {reason}")
    return (height, width) if turned else (width, height)


def open_file(file: Path | BytesIO) -> Image.Image:
    """Return a file's image, not decoded yet. Raises as Pillow does, also for PostScript."""
    opened = Image.open(file)
    if opened.format == "EPS":
        opened.close()
        raise PostScriptError(f"{file} is PostScript")
    return opened


def refusal(width: int, height: int) -> str | None:
    """Say why images of this size are refused, and what to do; None where they are not."""
    if not width or not height:
        return "has no pixels; replace it"
    if width * height > MAX_PIXELS:
        return f"has {width}x{height} pixels, more than is safe to decode; shrink it"
    if max(width, height) > MAX_RATIO * min(width, height):
        return (
            f"has {width}x{height} pixels: one side is more than {MAX_RATIO} times the other; "
            "crop or pad it"
        )
    return None


def _opened(source: ImageSource, where: str) -> tuple[Image.Image, str]:
    """Return an image that is not decoded yet, and its name for errors."""
    if isinstance(source, Image.Image):  # first: a view of one that was opened already
        return source, f"the image of {where}"
    try:
        found = _in_memory(source, where)
    except DataError:
        raise
    except Exception as error:  # whatever calls itself a tensor, a buffer or an address
        reason = str(error) or type(error).__name__
        raise DataError(f"the image of {where} is no file and no pixels: {reason:.200}") from error
    named = isinstance(found, Path) or isinstance(source, ImageFile)
    name = f"image {source!s:.1000} of {where}" if named else f"the image of {where}"
    if isinstance(found, Image.Image):
        return found, name
    if isinstance(found, Path):
        _check_file(found, name)
    try:
        with warnings.catch_warnings(action="ignore"):  # what matters is an error below
            return open_file(found), name
    except PostScriptError:
        raise DataError(f"{name} is PostScript, which is not run; convert it to PNG") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image Pillow can read; replace it") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is too large to decode: {error}; shrink it") from None
    except Exception as error:
        raise _undecodable(name, error) from error


def _in_memory(source: ImageSource, where: str) -> Path | BytesIO | Image.Image:
    """Return what is in memory, and no image yet, as Pillow reads it, or a file's path."""
    if isinstance(source, str):
        source = embedded(source) if is_embedded(source) else local_path(source)
    if isinstance(source, str | Path):
        return Path(source)
    if isinstance(source, ImageFile):
        source = source.read_bytes()
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesIO(source)
    if hasattr(source, "detach"):  # a tensor [3, H, W]; one of floats is from 0 to 1
        pixels = source.detach().cpu()
        if pixels.is_floating_point():
            pixels = pixels.float()
            least, most = (float(x) for x in pixels.aminmax()) if pixels.numel() else (0.0, 1.0)
            if not (least >= -_BEYOND and most <= 1 + _BEYOND):
                raise DataError(
                    f"the image of {where} has floats from {least:.3g} to {most:.3g}; they lie "
                    "from 0 to 1, without the encoder's mean and deviation (or are uint8)"
                )
            pixels = (pixels.clamp(0, 1) * 255).round().byte()
        source = pixels.permute(1, 2, 0).numpy() if pixels.ndim == 3 else pixels.numpy()
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.shape[2:] != (3,) or not source.size:
            kind = f"{source.dtype} {source.shape}; pixels are uint8 [H, W, 3]"
            raise DataError(f"the image of {where} is {kind}, or a tensor [3, H, W]")
        return Image.fromarray(source)
    raise DataError(f"the image of {where} is a {type(source).__name__}; give a file or pixels")


def _check_file(source: Path, name: str) -> None:
    """Raise DataError for what is no file."""
    try:
        mode = source.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: no name that a file may have
        if isinstance(error, OSError) and error.errno not in _ABSENT:
            raise _undecodable(name, error) from error
        remedy = _remedy(source)
        missing = MissingImage(f"{name} does not exist; {remedy}")
        missing.remedy = remedy
        raise missing from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise DataError(f"{name} is {kind}; name an image file")


def _decode(image: Image.Image, name: str, edge: int | None, upright: bool) -> Image.Image:
    if reason := refusal(*image.size):
        raise DataError(f"{name} {reason}")
    try:
        with warnings.catch_warnings(action="ignore"):  # as above; and advice on transparency
            if edge is not None:
                short = min(image.size)
                image.draft(None, (image.width * edge // short, image.height * edge // short))
            image.load()
            if upright:
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":
                image = _eight_bits(image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's
        return DataError(f"{name} cannot be read: {error.strerror}; check the file and its rights")
    reason = str(error) or type(error).__name__
    return DataError(
        f"{name} cannot be decoded ({reason:.200}); it may be truncated: fetch it again or remove "
        "the sample"
    )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 12, 16 or 32 bits, or of floats, with 8 bits."""
    signed = image.mode == "I" and image.format not in ("PNG", "PPM")  # older Pillows read 16 as 32
    bits = 32 if signed else 16
    if tags := getattr(image, "tag_v2", None):  # of a TIFF
        bits, signed = tags[_BITS][0], tags.get(_SAMPLE_FORMAT) == (_SIGNED,)
    white = 1.0 if image.mode == "F" else 2.0 ** (bits - signed) - 1
    found = np.empty((image.height, image.width), np.uint8)
    for top in range(0, image.height, _ROWS):
        rows = np.asarray(image.crop((0, top, image.width, min(top + _ROWS, image.height))))
        if bits == 32 and not signed and image.mode == "I":
            rows = rows.view(np.uint32)  # Pillow has no mode for it
        levels: npt.NDArray[np.float64] = np.nan_to_num(rows.astype(np.float64)) * (255 / white)
        found[top : top + _ROWS] = np.rint(levels.clip(0, 255))
    return Image.fromarray(found)


def _remedy(path: Path | str) -> str:
    """Return what to do about a missing file."""
    if _ADDRESS.search(str(path)):
        return "it is an address, and images are read from files: download it"
    if not str(path).isascii():
        found = Path()
        for part in Path(path).parts:  # each as it is spelt on the disk
            spelt = (
                found / form for form in (part, normalize("NFC", part), normalize("NFD", part))
            )
            found = next(filter(os.path.lexists, spelt), Path("\0"))
        if os.path.exists(found):
            return (
                "a file's name looks the same but has its accents in the other Unicode form (NFC "
                "or NFD): rename it, or write its name as the disk has it"
            )
    return MissingImage.remedy
