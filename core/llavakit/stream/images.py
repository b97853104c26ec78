"""Opens images, and cuts them into views; names the sample whose image cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from numbers import Integral
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
                "`video = {}` under [model.tiling], or in `changes.tiling` behind `init`"
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
            pictures = media().frames(source, kept, where, self.upright)
        else:
            pictures = [open_image(source, where, upright=self.upright)]  # whole: its size decides
            shown = Shown(*pictures[0].size, images)
        views = [view for one in pictures for view in self.tiling.cut(one, shown, self.view)]
        found, expected = [getattr(view, "mode", None) for view in views], self.of(shown).views
        if found != ["RGB"] * expected:
            raise ModelError(
                f"tiling `{self.tiling.name}` cuts an image of {where} into {len(views)} views, "
                f"{found[:3]}; let `cut` give as many RGB images as `arrange` says: {expected}"
            )
        return views

    def read(self, encoder: VisionEncoder, source: ImageSource, where: str, images: int) -> Tensor:
        """Return the pixels `[views, 3, H, W]` of one of a sample's, which has so many `images`."""
        import torch

        views = self.cut(source, where, images, encoder.decode_edge)
        return torch.stack([read_pixels(encoder, view, where) for view in views])


@lru_cache(maxsize=512)
def _arranged(tiling: Tiling | None, shown: Shown, view: View) -> Arrangement:
    if not isinstance(view.tokens, Integral) or view.tokens < 1:
        raise ModelError(
            f"the connector makes {view.tokens!r} tokens of a view; let its `tokens`, and that of "
            "the vision encoder, return a whole number from 1 on"
        )
    if tiling is None:
        return Arrangement(1, np.arange(view.tokens)[:, None])
    made, least = tiling.arrange(shown, view), -1 if tiling.separates else 0
    index_RK, weights_RK = (getattr(made, name, None) for name in ("index_RK", "weights_RK"))
    whole = isinstance(index_RK, np.ndarray) and (index_RK.dtype, index_RK.ndim) == (np.int64, 2)
    within = whole and index_RK.size and least <= index_RK.min()
    within = within and index_RK.max() < made.views * view.tokens
    if not within or np.shape(weights_RK) not in ((), np.shape(index_RK)):
        raise ModelError(
            f"tiling `{tiling.name}` lays an image of {shown.width} x {shown.height} out in rows "
            f"that its views do not have; let `arrange` give an index [R, K] of int64, from {least}"
            f" to {view.tokens} a view, and weights of that shape or none"
        )
    return made
