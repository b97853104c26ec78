"""Video files, through PyAV: FFmpeg's libraries, which come with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import EINVAL
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from llavakit import Clip, DataError
from llavakit_plugins.media.images import refusal

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,webp"
"""FFmpeg's names of containers that hold everything themselves. Playlists (`hls`, `concat`) are
left out: they name other files and addresses, which would be read in their place."""
_FEW, _SHARE = 2, 50  # frames that a header may count too many: so many, or this part of all
_TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""How a frame is turned by a display matrix `a b c d`: x to ax + cy, y to bx + dy, y downwards."""
_LEVEL = (
    Image.Transpose.ROTATE_180, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM
)  # fmt: skip
_UNIT = 1 << 16  # 1 in a display matrix
_BLOCK, _LINES = 128, 1024
"""What decoders have beside a frame, in pixels: sides of whole blocks, and lines to work in."""


def clip(source: Path | bytes, name: str, upright: bool = False) -> Clip:
    """Return what the header says; where it counts no frames, the file's packets are counted.

    How a file is turned upright is noted with its first frame, which is decoded then.
    """
    with _opened(source, name) as (container, stream):
        context = stream.codec_context
        frames = stream.frames
        if frames <= 0:
            frames = sum(packet.size > 0 for packet in container.demux(stream))
        rate = stream.average_rate or stream.guessed_rate
        width, height = context.width, context.height
    # what is too large is not decoded
    if upright and refusal(width, height) is None and _is_sideways(source, name):
        width, height = height, width
    return Clip(width, height, frames, float(rate or 0))


def check(source: Path | bytes, expected: int, name: str) -> None:
    """Raise DataError where a file holds fewer frames than it should; none is decoded."""
    with _opened(source, name) as (container, stream):
        _check_end(sum(packet.size > 0 for packet in container.demux(stream)), expected, name)


def _check_end(count: int, expected: int, name: str) -> None:
    if not count or expected - count > max(_FEW, expected // _SHARE):
        raise DataError(
            f"{name} ends after {count} of {expected} frames; it may be truncated: fetch it again "
            "or remove the sample"
        )


def _is_sideways(source: Path | bytes, name: str) -> bool:
    """Say whether width and height of a file change places where it is turned upright."""
    with _opened(source, name) as (container, stream):
        first = next(_decoded(container, stream, name), None)
        turn = None if first is None else _turn_of(first)
        return turn is not None and turn not in _LEVEL


def _decoded(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """Yield the frames. Raises DataError for one that is larger than the header says.

    What may be decoded is decided by the header; FFmpeg, asked so, decodes no frame far above it.
    """
    context = stream.codec_context
    width, height = context.width, context.height
    most = (width + _BLOCK) * max(height + _BLOCK, _LINES)
    context.options = {"max_pixels": str(most)}
    for frame in container.decode(stream):
        if frame.width * frame.height > width * height:
            raise DataError(
                f"{name} has a frame of {frame.width}x{frame.height} pixels, and its header says "
                f"{width}x{height}; convert it to one size"
            )
        yield frame


def _turn_of(frame: Any) -> Image.Transpose | None:
    """Return what turns a frame as its display matrix says; None for nothing, or odd angles."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            matrix = np.frombuffer(bytes(data), np.int32)[[0, 1, 3, 4]]
            return _TURNS.get(tuple((matrix / _UNIT).tolist()))
    return None


def _image_of(frame: Any, upright: bool) -> Image.Image:
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _turn_of(frame) if upright else None
    return image if turn is None else image.transpose(turn)


def frames(
    source: Path | bytes, kept: Sequence[int], expected: int, name: str, upright: bool = False
) -> list[Image.Image]:
    """Return frames by their numbers, ascending; of a few that a header counts too many, the last.

    They are turned as the file notes if `upright`.
    Raises DataError where the file ends much before it should.
    """
    found: list[Image.Image] = []
    with _opened(source, name) as (container, stream):
        count, last = 0, cast("Any", None)
        for last in _decoded(container, stream, name):
            while len(found) < len(kept) and kept[len(found)] == count:
                found.append(_image_of(last, upright))
            count += 1
            if len(found) == len(kept):
                return found
        _check_end(count, expected, name)
        rest = _image_of(last, upright)
        return found + [rest] * (len(kept) - len(found))


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """Yield a container and its first video stream. Raises DataError for what cannot be read."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"{name} needs PyAV to be decoded, which cannot be imported ({error!s:.300}): `pip "
            "install 'llavakit[video]'`; a folder of frames is read without it"
        ) from None
    av.logging.set_level(av.logging.PANIC)  # what matters about a damaged file is an error below
    found = False
    with ExitStack() as stack:
        try:
            # an open file, not a name: in a name FFmpeg would see addresses and patterns
            file = BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
            stack.callback(file.close)
            container = stack.enter_context(
                av.open(
                    file,
                    container_options={"format_whitelist": _FORMATS},
                    metadata_errors="replace",
                )
            )
            if not container.streams.video:
                raise DataError(f"{name} has no video in it; replace it, or remove the sample")
            stream = container.streams.video[0]
            if stream.codec_context is None:  # of a codec that nobody knows
                raise DataError(f"{name} is not a video that PyAV can read; replace it")
            found = True
            yield container, stream
        except av.FFmpegError as error:
            if error.errno == EINVAL and not found:  # what is not in the list of formats
                raise DataError(f"{name} is not a video that PyAV can read; replace it") from None
            larger = ", or a frame larger than the header says" if error.errno == EINVAL else ""
            raise DataError(
                f"{name} cannot be decoded ({error.strerror:.200}); it may be truncated{larger}: "
                "fetch it again or remove the sample"
            ) from error
        except DataError:
            raise
        except OSError as error:
            raise DataError(
                f"{name} cannot be read: {error.strerror}; check the file and its rights"
            ) from error
        except Exception as error:  # PyAV raises whatever a damaged file leads it to
            reason = str(error) or type(error).__name__
            raise DataError(
                f"{name} cannot be decoded ({reason:.200}); it may be truncated: fetch it again or "
                "remove the sample"
            ) from error
