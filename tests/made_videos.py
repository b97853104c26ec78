"""Videos that tests make: files through PyAV, where it is installed, and folders of frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def greys(count: int, size: tuple[int, int] = (64, 48)) -> list[Pixels]:
    """Return frames of one grey each, brighter from frame to frame."""
    width, height = size
    levels = np.linspace(0, 255, count).astype(np.uint8)
    return [np.full((height, width, 3), level, np.uint8) for level in levels]


def write_video(
    path: Path, frames: Sequence[Pixels], *, rate: int = 10, codec: str = "mpeg4"
) -> Path:
    """Write a video file in the format that its suffix says; the test is left out without PyAV."""
    av = pytest.importorskip("av")
    height, width, _ = frames[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, frames: Sequence[Pixels]) -> Path:
    """Write a folder of frames whose names sort wrongly as text: 9.png and 10.png."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder
