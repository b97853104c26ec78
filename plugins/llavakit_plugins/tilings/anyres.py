"""A base view, and tiles of the image at a higher resolution: LLaVA-NeXT's AnyRes.

Sources: LLaVA-NeXT (llava-vl.github.io/blog/2024-01-30-llava-next), `image_aspect_ratio = "anyres"`
with `mm_patch_merge_type = "spatial_unpad"`; LLaVA-OneVision (arXiv 2408.03326) for `cap`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import sqrt
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field, PositiveInt

from llavakit import Arrangement, Options, Shown, View
from llavakit_plugins.media.thin_images import RGB, pad_to_square
from llavakit_plugins.tilings.geometry import (
    Filter,
    Grid,
    Taps,
    best_grid,
    fitted,
    grid_edge,
    interpolated,
    laid_out,
    resized,
    tiles,
    without_padding,
)
from llavakit_plugins.tilings.video import VideoOptions, WithVideos

_SEPARATOR = -1  # stands for the learned row
_ABOVE = 1.1  # how much longer than the cap an edge may be before it is interpolated (OneVision)


def _all_up_to(value: Any) -> Any:
    """Turn "6x6" into every grid from 1x1 to 6x6, row by row."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", value)
    if match is None:
        raise ValueError('state a list of [rows, columns], or the largest of all grids as "6x6"')
    rows, columns = map(int, match.groups())
    return [(row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)]


_Pair = tuple[PositiveInt, PositiveInt]


class AnyresOptions(Options):
    """Options of `anyres`; the defaults are LLaVA-NeXT's."""

    grids: Annotated[tuple[_Pair, ...], BeforeValidator(_all_up_to), Field(min_length=1)] = (
        (1, 2), (2, 1), (2, 2), (3, 1), (1, 3),
    )  # fmt: skip
    """The grids to choose from, as [rows, columns] of tiles; of equally good ones the first. "6x6"
    is every grid from 1x1 to 6x6, as in LLaVA-OneVision."""
    max_tiles: PositiveInt | None = None
    """Leaves out grids of more tiles."""
    unpad: bool = True
    """Whether embeddings that show nothing but padding are left out."""
    newline: bool = True
    """Whether each line of embeddings ends with a learned row, `image_newline`."""
    cap: PositiveInt | None = None
    """The most embeddings of the tiles, in views: beyond it they are interpolated to about as many.
    9 is LLaVA-OneVision's `anyres_max_9`."""
    only_alone: bool = False
    """Whether an image that is not its sample's only one stays one view, as in LLaVA-OneVision."""
    pad: RGB | None = None
    """The colour, each from 0 to 1, in the middle of whose square an image that stays one view is
    put, as in LLaVA-OneVision; by default it is squashed."""
    interpolation: Filter = "bicubic"
    """Pillow's filter for resizing."""
    video: VideoOptions | None = None
    """How videos are shown; unset: not at all."""


class Anyres(WithVideos):
    """A base view of the whole image, then its tiles, line by line over all of them."""

    name = "anyres"
    Options = AnyresOptions
    options: AnyresOptions

    def __init__(self, options: AnyresOptions) -> None:
        super().__init__(options)
        self.separates |= options.newline
        most = options.max_tiles
        # 1x1 where none is small enough: an image has at least its own view as a tile
        self._grids: tuple[Grid, ...] = tuple(
            grid for grid in options.grids if most is None or grid[0] * grid[1] <= most
        ) or ((1, 1),)

    def arrange_image(self, shown: Shown, view: View) -> Arrangement:
        edge = grid_edge(view)
        base = laid_out((1, 1), edge, 0)[..., None]
        separator = np.full(1 if self.options.newline else 0, _SEPARATOR)
        if self._stays_one(shown):
            index = np.concatenate((base.reshape(-1), separator))[:, None]
            # a padded view shows more than the image
            shows = self.options.pad is None or shown.width == shown.height
            return Arrangement(1, index, overview=(edge, edge) if shows else None)
        grid = best_grid(shown, self._grids, view.size)
        lines_HW = laid_out(grid, edge, view.tokens)
        if self.options.unpad:
            lines_HW = without_padding(lines_HW, shown)
        taps = self._capped(lines_HW, edge)
        count = taps.index_HWK.shape[2]
        parts: list[tuple[Any, Any]] = [(base.repeat(count, axis=2), np.eye(1, count)), taps]
        if self.options.newline:
            column = np.full((len(taps.index_HWK), 1, count), _SEPARATOR)
            joined = np.concatenate((taps.index_HWK, column), axis=1)
            weights = np.pad(taps.weights_HWK, ((0, 0), (0, 1), (0, 0)))
            parts[1] = (joined, weights)
        index_RK = np.concatenate([index.reshape(-1, count) for index, _ in parts])
        weights_RK = np.concatenate(
            [np.broadcast_to(w, index.shape).reshape(-1, count) for index, w in parts]
        )
        return Arrangement(
            1 + grid[0] * grid[1],
            index_RK,
            weights_RK.astype(np.float32) if count > 1 else None,
            overview=(edge, edge),
        )

    def cut_image(self, image: Image.Image, shown: Shown, view: View) -> Sequence[Image.Image]:
        size, how = view.size, self.options.interpolation
        if self._stays_one(shown) and self.options.pad is not None:
            image = pad_to_square(image, self.options.pad)
        base = resized(image, size, size, how)
        if self._stays_one(shown):
            return [base]
        grid = best_grid(shown, self._grids, size)
        return [base, *tiles(fitted(image, grid, size, how), size)]

    def _stays_one(self, shown: Shown) -> bool:
        return self.options.only_alone and shown.images > 1

    def _capped(self, lines_HW: Any, edge: int) -> Taps:
        """Return the tiles' embeddings, interpolated where they are too many."""
        cap, (height, width) = self.options.cap, lines_HW.shape
        if cap is not None:
            # one factor for both edges keeps the proportions;
            # rounded down, as in LLaVA-OneVision's code
            ratio = sqrt(height * width / (cap * edge**2))
            if ratio > _ABOVE:
                return interpolated(lines_HW, int(height // ratio), int(width // ratio))
        index_HWK = lines_HW[..., None]
        return Taps(index_HWK, np.ones(index_HWK.shape))
