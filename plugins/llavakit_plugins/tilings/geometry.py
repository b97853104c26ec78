"""Tiles of an image, and the grid of embeddings that they form side by side.

Shapes: H and W height and width of a grid of embeddings, K embeddings that a row is made of.
"""

from __future__ import annotations

from math import ceil, isqrt
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from llavakit import ModelError, Shown, View
from llavakit_plugins.media.resizing import resize

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Grid = tuple[int, int]  # rows and columns of tiles
IntArray = npt.NDArray[np.int64]


class Taps(NamedTuple):
    """Embeddings of a grid `[H, W, K]`, each with its weight."""

    index_HWK: IntArray
    weights_HWK: npt.NDArray[np.float64]


def grid_edge(view: View) -> int:
    """Return the edge of a view's grid. Raises ModelError where its tokens form no square."""
    if (edge := isqrt(view.tokens)) ** 2 != view.tokens:
        raise ModelError(
            f"a view has {view.tokens} visual tokens, which form no square that could be laid out "
            'beside others; where the encoder keeps its class token, set `select = "patch"`'
        )
    return edge


def resized(image: Image.Image, width: int, height: int, how: Filter) -> Image.Image:
    """Return an image of this size."""
    return resize(image, (width, height), Image.Resampling[how.upper()])


def tiles(image: Image.Image, size: int) -> list[Image.Image]:
    """Return the squares of an image whose sides are multiples of `size`, row by row."""
    return [
        image.crop((left, top, left + size, top + size))
        for top in range(0, image.height, size)
        for left in range(0, image.width, size)
    ]


def best_grid(shown: Shown, grids: tuple[Grid, ...], size: int) -> Grid:
    """Return the grid that keeps most of an image's pixels and, of equal ones, wastes least.

    The first of several equal ones, as in LLaVA-NeXT's `select_best_resolution`.
    """

    def merit(grid: Grid) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * size / shown.width, rows * size / shown.height)
        # pixels that an enlarged image gains show nothing new, and do not count
        kept = int(shown.width * scale) * int(shown.height * scale)
        return min(kept, shown.width * shown.height), -rows * columns

    return max(grids, key=merit)


def fitted(image: Image.Image, grid: Grid, size: int, how: Filter) -> Image.Image:
    """Return an image as large as its proportions allow, amid the black of a grid of tiles."""
    height, width = grid[0] * size, grid[1] * size
    across, down = width / image.width, height / image.height
    if across < down:
        # rounded up, as in the original's `resize_and_pad_image`
        new = (width, min(ceil(image.height * across), height))
    else:
        new = (min(ceil(image.width * down), width), height)
    whole = Image.new("RGB", (width, height))
    whole.paste(resized(image, *new, how), ((width - new[0]) // 2, (height - new[1]) // 2))
    return whole


def laid_out(grid: Grid, edge: int, first: int) -> IntArray:
    """Return the index `[H, W]` of each embedding of tiles side by side; `first` is the first's."""
    rows, columns = grid
    index = first + np.arange(rows * columns * edge**2).reshape(rows, columns, edge, edge)
    return index.transpose(0, 2, 1, 3).reshape(rows * edge, columns * edge)


def without_padding(index_HW: IntArray, shown: Shown) -> IntArray:
    """Return a grid without the rows or columns that `fitted` has left black.

    A line that shows any of the image stays, and so does its counterpart, as in LLaVA-NeXT.
    """
    height, width = index_HW.shape
    if shown.width / shown.height > width / height:
        # rounded at seven digits before it is cut, as in transformers:
        # 24 may come out as 23.999999999
        seen = int(round(shown.height * (width / shown.width), 7))
        cut = (height - seen) // 2
        return index_HW[cut : height - cut]
    seen = int(round(shown.width * (height / shown.height), 7))
    cut = (width - seen) // 2
    return index_HW[:, cut : width - cut]


def interpolated(index_HW: IntArray, height: int, width: int) -> Taps:
    """Return a grid of another size, as torch's bilinear interpolation makes it."""
    (top, bottom, down), (left, right, across) = (
        _line(known, new) for known, new in zip(index_HW.shape, (height, width), strict=True)
    )
    corners = [(y, x) for y in (top, bottom) for x in (left, right)]
    shares = [(v, u) for v in (1 - down, down) for u in (1 - across, across)]
    index = np.stack([index_HW[np.ix_(y, x)] for y, x in corners], axis=-1)
    weights = np.stack([np.outer(v, u) for v, u in shares], axis=-1)
    return Taps(index, weights)


def _line(known: int, new: int) -> tuple[IntArray, IntArray, npt.NDArray[np.float64]]:
    """Return both neighbours of each new point of a line, and the weight of the second."""
    # the middle of each new cell, in old cells; without corners that fall together
    at = np.maximum((np.arange(new) + 0.5) * (known / new) - 0.5, 0)
    before = at.astype(np.int64)
    return before, np.minimum(before + 1, known - 1), at - before
