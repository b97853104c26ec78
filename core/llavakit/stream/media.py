"""What opens images and videos: a plugin, the entry point `llavakit.media`. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol, cast

from llavakit.registry.entry_points import only
from llavakit.stream.tiling import Clip

if TYPE_CHECKING:
    from PIL.Image import Image

    from llavakit.contracts.data import ImageSource, Video


class Reader(Protocol):
    """Opens media; `where` names the sample in errors, which are DataError."""

    def open_image(
        self, source: ImageSource, where: str, edge: int | None = None, *, upright: bool = False
    ) -> Image:
        """Return an RGB image; see `llavakit.open_image`."""

    def image_size(
        self, source: ImageSource, where: str, *, upright: bool = False
    ) -> tuple[int, int]:
        """Return the width and height of what `open_image` returns."""

    def clip(self, video: Video, where: str, upright: bool) -> Clip:
        """Return what a video's header says, or counts that it lacks."""

    def frames(self, video: Video, kept: Sequence[int], where: str, upright: bool) -> list[Image]:
        """Return these frames, ascending, as RGB images."""


@cache
def media() -> Reader:
    """Return the installed reader."""
    return cast("Reader", only("llavakit.media", "reader"))
