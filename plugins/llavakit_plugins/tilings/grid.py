"""Tiles of a fixed grid, one after another, and the whole image in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field

from llavakit import Arrangement, Options, Shown, View
from llavakit_plugins.tilings.geometry import Filter, resized, tiles
from llavakit_plugins.tilings.video import VideoOptions, WithVideos

_Tiles = Annotated[int, Field(gt=0, le=64)]


class GridOptions(Options):
    """Options of `grid`."""

    rows: _Tiles = 2
    columns: _Tiles = 2
    base: bool = True
    """Whether the whole image is a view, too, the first."""
    interpolation: Filter = "bicubic"
    """Pillow's filter for resizing."""
    video: VideoOptions | None = None
    """How videos are shown; unset: not at all."""


class Grid(WithVideos):
    """`rows` x `columns` tiles of an image squashed to that grid: as many tokens for every image.

    Views keep their own order, one behind the other, without rows between them.
    """

    name = "grid"
    Options = GridOptions
    options: GridOptions

    def arrange_image(self, shown: Shown, view: View) -> Arrangement:
        views = self.options.rows * self.options.columns + self.options.base
        edge = isqrt(view.tokens)
        shows = self.options.base and edge**2 == view.tokens
        index_RK = np.arange(views * view.tokens)[:, None]
        return Arrangement(views, index_RK, overview=(edge, edge) if shows else None)

    def cut_image(self, image: Image.Image, shown: Shown, view: View) -> Sequence[Image.Image]:
        size, how = view.size, self.options.interpolation
        whole = resized(image, self.options.columns * size, self.options.rows * size, how)
        base = [resized(image, size, size, how)] if self.options.base else []
        return [*base, *tiles(whole, size)]
