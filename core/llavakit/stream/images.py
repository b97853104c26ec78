"""Opens images, and cuts them into views; names the sample whose image cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llavakit.contracts.data import ImageSource, Video
from llavakit.contracts.errors import ModelError
from llavakit.stream.encode import Encoded
from llavakit.stream.media import media
from llavakit.stream.tiling import Arrangement, Clip, Shown, Tiling, View

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from llavakit.contracts.networks import VisionEncoder

USUAL = Shown(640, 480)  #: The size of most of COCO's images: what plans reckon with.


def open_image(
    source: ImageSource, where: str, edge: int | None = None, *, upright: bool = False
) -> Image:
    """Return an RGB image; `where` names the sample in errors.

    Animated images give their first frame. Greys of more than 8 bits are scaled from the range of
    the file's bits, or else of their type; floats from 0..1. As in the original LLaVA, transparency
    is dropped; a camera's orientation note (EXIF) is applied if `upright`, not by default. With
    `edge`, a JPEG may be decoded at a half, a quarter or an eighth whose shorter side is not below.

    Raises DataError where the file is missing, truncated, no image, a decompression bomb, or many
    times as long as wide.
    """
    return media().open_image(source, where, edge, upright=upright)


def image_size(source: ImageSource, where: str, *, upright: bool = False) -> tuple[int, int]:
    """Return the width and height that `open_image` gives, from the header alone; as it raises."""
    return media().image_size(source, where, upright=upright)


def read_pixels(
    encoder: VisionEncoder, source: ImageSource, where: str, *, upright: bool = False
) -> Tensor:
    """Return the pixels `[3, H, W]` that a vision encoder reads of an image that is one view."""
    pixels_3HW = encoder.prepare(open_image(source, where, encoder.decode_edge, upright=upright))
    expected = (encoder.channels, encoder.image_size, encoder.image_size)
    if tuple(pixels_3HW.shape) != expected:
        raise ModelError(
            f"vision encoder `{encoder.name}` prepares an image as {tuple(pixels_3HW.shape)}, but "
            f"its `image_size` says {expected}; fix `prepare` or `image_size`"
        )
    return pixels_3HW


class Views(NamedTuple):
    """How a model sees images."""

    tiling: Tiling | None  #: None where every image is one view: no header is read then.
    view: View
    upright: bool = False  #: See `open_image`.

    def of(self, shown: Shown = USUAL) -> Arrangement:
        """Return the rows of an image."""
        return _arranged(self.tiling, shown, self.view)

    def shown(self, images: Sequence[ImageSource], where: str) -> list[Shown]:
        """Return what the rows of a sample's images depend on; without a tiling nothing.

        Raises ModelError for a video where the tiling shows none.
        """
        stills = sum(not isinstance(image, Video) for image in images)
        read = images if stills < len(images) or self.tiling is not None else ()
        return [self._shown(image, where, stills)[0] for image in read]

    def _shown(self, image: ImageSource, where: str, images: int) -> tuple[Shown, Sequence[int]]:
        """Return what the rows of an image depend on, and which frames of a video are shown."""
        if not isinstance(image, Video):
            return Shown(*image_size(image, where, upright=self.upright), images), ()
        clip = Clip(0, 0, 0, 0) if self.tiling is None else media().clip(image, where, self.upright)
        if self.tiling is None or (frames := self.tiling.sample(clip)) is None:
            name = "single" if self.tiling is None else self.tiling.name
            raise ModelError(
                f"{where} shows a video, and the tiling `{name}` shows none as it is set; give it "
                "`video = {}` under [model.tiling], or choose one that does"
            )
        return Shown(clip.width, clip.height, images, len(frames)), frames

    def place(self, encoded: Encoded, shown: Sequence[Shown]) -> Encoded:
        """Return a sample that knows the rows of its images, which are `shown`."""
        arranged = None if self.tiling is None else tuple(map(self.of, shown))
        return replace(encoded, arranged=arranged)

    def cut(
        self, source: ImageSource, where: str, images: int, edge: int | None = None
    ) -> Sequence[Image]:
        """Return the views of one of a sample's, which has so many `images`; see `open_image`."""
        if self.tiling is None:
            return (open_image(source, where, edge, upright=self.upright),)
        if isinstance(source, Video):
            shown, kept = self._shown(source, where, images)
            frames = media().frames(source, kept, where, self.upright)
            return [view for one in frames for view in self.tiling.cut(one, shown, self.view)]
        image = open_image(source, where, upright=self.upright)  # whole: its size decides
        return self.tiling.cut(image, Shown(*image.size, images), self.view)

    def read(self, encoder: VisionEncoder, source: ImageSource, where: str, images: int) -> Tensor:
        """Return the pixels `[views, 3, H, W]` of one of a sample's, which has so many `images`."""
        import torch

        views = self.cut(source, where, images, encoder.decode_edge)
        return torch.stack([read_pixels(encoder, view, where) for view in views])


@lru_cache(maxsize=512)
def _arranged(tiling: Tiling | None, shown: Shown, view: View) -> Arrangement:
    if tiling is None:
        return Arrangement(1, np.arange(view.tokens)[:, None])
    return tiling.arrange(shown, view)
