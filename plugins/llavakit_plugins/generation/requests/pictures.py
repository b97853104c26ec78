"""Images of messages: what tells one from another, their size, and how a service is sent them.

An image file that services read, and that is not too large, is sent as it is. Any other is encoded
again: larger ones are made smaller, and turned upright where a camera's note says so.
"""

from __future__ import annotations

import io
import warnings
from base64 import b64encode
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from PIL import Image

from llavakit import DataError, open_image
from llavakit.contracts.data import ImageFile, ImageSource
from llavakit_plugins.media.images import open_file

_SENT_AS_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
"""What OpenAI's vision guide lists; a GIF that moves is not among it."""
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")  # decoders agree on what these look like
_ORIENTATION = 0x0112  # EXIF
# Below 60 the blocks of JPEG become visible.
_QUALITIES = (92, 80, 60)


def hash_image(source: ImageSource) -> str:
    """Return the SHA-256 of an image's content, as hex: of a file, its bytes, wherever it lies.

    Raises DataError where there is none.
    """
    if isinstance(source, Path):
        try:
            state = source.stat()
            return _hash_file(source, state.st_size, state.st_mtime_ns)
        except OSError as error:
            raise DataError(f"cannot read image {source}: {error.strerror}") from error
    if isinstance(source, ImageFile):
        source = source.read_bytes()
    if isinstance(source, bytes):
        return sha256(source).hexdigest()
    if isinstance(source, str):
        return sha256(source.encode(errors="surrogatepass")).hexdigest()
    image = source if isinstance(source, Image.Image) else open_image(source, "a message")
    # equal bytes of another shape or mode are another image
    facts = f"{image.mode} {image.size} ".encode()
    return sha256(facts + image.tobytes()).hexdigest()


@lru_cache(maxsize=1 << 18)  # a job's images are asked for again and again
def _hash_file(path: Path, size: int, modified: int) -> str:
    return sha256(path.read_bytes()).hexdigest()


def size_of(source: ImageSource, edge: int) -> tuple[int, int]:
    """Return width and height of an image as it is sent, no side longer than `edge`.

    Of a file its header alone is read. Raises DataError where it is no image.
    """
    if isinstance(source, Path):
        try:
            state = source.stat()
            size = _size_of_file(source, state.st_size, state.st_mtime_ns)
        except OSError as error:
            raise DataError(f"cannot read image {source}: {error}") from error
    elif isinstance(source, Image.Image):
        size = source.size
    else:
        size = open_image(source, "a message").size
    return _shrunk(size, edge)


@lru_cache(maxsize=1 << 18)
def _size_of_file(path: Path, size: int, modified: int) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a bomb; it is refused when it is to be sent
        with open_file(path) as image:
            return image.size


def data_url(source: ImageSource, *, edge: int, most_bytes: int) -> str:
    """Return an image as a `data:` address. Raises DataError where it cannot be used or sent."""
    kind, data = _encoded(source, edge, most_bytes)
    return f"data:{kind};base64,{b64encode(data).decode()}"


def _encoded(source: ImageSource, edge: int, most_bytes: int) -> tuple[str, bytes]:
    if isinstance(source, ImageFile) and not isinstance(source, Path):
        source = source.read_bytes()
    known = _as_it_is(source, edge, most_bytes)
    if known is not None:
        return known
    image = open_image(source, "a message", upright=True)
    image = image.resize(_shrunk(image.size, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= most_bytes:
            return "image/jpeg", buffer.getvalue()
    raise DataError(
        f"an image has {buffer.tell():,} bytes even as a small JPEG, and `image_bytes` allows "
        f"{most_bytes:,}; lower `image_edge`, or raise it"
    )


def _as_it_is(source: ImageSource, edge: int, most_bytes: int) -> tuple[str, bytes] | None:
    """Return the file of an image where it can be sent unchanged, else None."""
    if isinstance(source, Path) and source.is_file() and source.stat().st_size <= most_bytes:
        data = source.read_bytes()
    elif isinstance(source, bytes) and len(source) <= most_bytes:
        data = source
    else:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_file(io.BytesIO(data)) as image:
                kind = _SENT_AS_IS.get(image.format or "")
                plain = image.getexif().get(_ORIENTATION, 1) == 1 and not _moves(image)
                if kind is None or not plain or image.mode not in _MODES or max(image.size) > edge:
                    return None
                open_image(source, "a message")  # what is broken is not sent
                return kind, data
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # `open_image` says what is wrong


def _moves(image: Image.Image) -> bool:
    return bool(getattr(image, "is_animated", False))


def _shrunk(size: tuple[int, int], edge: int) -> tuple[int, int]:
    scale = min(1.0, edge / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
