"""Draws attention maps: a heat map over an image, and a sheet with one for each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from llavakit import open_image
from llavakit.contracts.data import ImageSource
from llavakit.contracts.errors import DataError

if TYPE_CHECKING:
    from llavakit.contracts.networks import VisionEncoder
    from llavakit_plugins.heatmaps.attention_maps import AttentionMaps

Floats = npt.NDArray[np.float64]
Region = tuple[float, float, float, float]

_STOPS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""From cold to hot: dark, violet, red, orange, light yellow, evenly spaced."""
_LEAST, _MOST = 336, 768  # the longer edge of an image in a sheet, in pixels
_WORDS, _COLUMNS, _MARGIN, _LINE = 12, 4, 8, 16
_SMALLEST = 4  # edge of an image, in pixels


def seen_region(vision: VisionEncoder, size: tuple[int, int]) -> Region:
    """Return the region of an image that an encoder sees: left, top, right, bottom in its pixels.

    It is found by preparing ramps of the same size, so it works with any `prepare`. If images are
    cut, the region is smaller than the image; if they are padded, it is larger. Raises DataError if
    `prepare` does something else, or if the image is too small.
    """
    if min(size) < _SMALLEST:
        raise DataError(
            f"an image of {size[0]}x{size[1]} pixels is too small to draw a heat map over"
        )
    width, height = size
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[:, :, 0] = np.rint(np.linspace(0, 255, width))
    ramps[:, :, 1] = np.rint(np.linspace(0, 255, height))[:, None]
    shades = (np.zeros_like(ramps), np.full_like(ramps, 255), ramps)
    black, white, shown = (
        vision.prepare(Image.fromarray(shade)).double().numpy() for shade in shades
    )
    span = white - black
    largest = np.abs(span).max(axis=(1, 2), keepdims=True)
    whole = (np.abs(span) > 0.99 * largest).all(axis=0)  # elsewhere is padding
    if whole.sum() < 2:
        raise DataError(f"`{vision.name}` shows too little of an image of {width}x{height} pixels")
    values = np.where(whole, (shown - black) / np.where(whole, span, 1.0), 0.0)
    left, right = _extent(values[0], whole, width)
    top, bottom = _extent(values[1].T, whole.T, height)
    return left, top, right, bottom


def _extent(values: Floats, whole: npt.NDArray[np.bool_], length: int) -> tuple[float, float]:
    """Return where the first column begins and the last ends, by a line through the means."""
    columns = np.flatnonzero(whole.any(axis=0))
    counts = whole.sum(axis=0)[columns]
    positions = values.sum(axis=0)[columns] / counts * (length - 1) + 0.5
    inner = slice(1, -1) if len(columns) > 4 else slice(None)  # resampling blurs at the ends
    slope, start = np.polyfit(columns[inner] + 0.5, positions[inner], 1)
    error = np.abs(slope * (columns[inner] + 0.5) + start - positions[inner]).max()
    if slope <= 0 or error > 0.02 * length + 1:
        raise DataError("the encoder bends or turns the image, so no heat map fits over it")
    return float(start), float(slope * values.shape[1] + start)


def draw_heat(image: ImageSource, weights_GG: Floats, region: Region) -> Image.Image:
    """Return the image with its heat map; the hottest colour is at the largest weight.

    `region` is the position of the grid in pixels of the image. The rest of the image, which the
    model did not see, is drawn dark.
    """
    return _Canvas(image, region, len(weights_GG)).heated(weights_GG)


class _Canvas:
    """An image that heat maps of one grid are drawn over: what they have in common."""

    def __init__(self, image: ImageSource, region: Region, cells: int) -> None:
        photo = open_image(image, "the heat map")
        edge = max(photo.size)
        scale = min(max(edge, _LEAST), _MOST) / edge
        size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
        small = scale > 1 and edge <= 128
        # a digit of 28 pixels would be a blur
        kind = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
        pixels = np.asarray(photo.resize(size, kind), np.float64)
        grey = pixels.mean(axis=-1, keepdims=True)
        self._under, self._dark = 0.5 * pixels + 0.5 * grey, 0.35 * grey
        self._down, seen_y = _positions(region[1] * scale, region[3] * scale, size[1], cells)
        self._across, seen_x = _positions(region[0] * scale, region[2] * scale, size[0], cells)
        self._seen = seen_y[:, None] & seen_x[None, :]

    def heated(self, weights_GG: Floats) -> Image.Image:
        """Return the image under the heat of these weights."""
        # attention to images may be 0
        relative_GG = weights_GG / max(weights_GG.max(), 1e-12)
        # between cells it changes as a straight line
        heat = self._down.T @ relative_GG @ self._across
        stops = np.asarray(_STOPS, np.float64)
        colours = np.empty_like(self._under)
        for c in range(3):
            colours[..., c] = np.interp(heat, np.linspace(0, 1, len(stops)), stops[:, c])
        # cold is tinted, too: what is seen differs from what is not
        share = 0.25 + 0.45 * heat[..., None]
        colours *= share
        colours += (1 - share) * self._under
        mixed = np.where(self._seen[..., None], colours, self._dark)
        return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _positions(
    start: float, end: float, pixels: int, cells: int
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return each cell's part in each pixel `[cells, pixels]`, and which pixels are within."""
    middle = (np.arange(pixels) + 0.5 - start) / (end - start) * cells - 0.5
    near = np.clip(middle, 0, cells - 1)
    parts = np.clip(1 - np.abs(near[None, :] - np.arange(cells)[:, None]), 0, 1)
    return parts, (middle >= -0.5) & (middle <= cells - 0.5)


def draw_attention_maps(
    answer: AttentionMaps, images: Sequence[ImageSource], vision: VisionEncoder
) -> Image.Image:
    """Return a sheet: the whole answer's heat over each image, then that of its first words."""
    opened = [open_image(image, "the heat map") for image in images]
    regions = [seen_region(vision, image.size) for image in opened]
    maps = answer.weights_AIGG.double().numpy()
    canvases = [
        _Canvas(image, region, maps.shape[-1])
        for image, region in zip(opened, regions, strict=True)
    ]
    large = [canvas.heated(maps[:, number].mean(axis=0)) for number, canvas in enumerate(canvases)]
    width = sum(tile.width + _MARGIN for tile in large)
    small = max(64, (width - _MARGIN) // _COLUMNS - _MARGIN)
    tiles = []
    for word, weights_IGG in answer.words[:_WORDS]:
        row = [
            canvas.heated(weights)
            for canvas, weights in zip(canvases, weights_IGG.double().numpy(), strict=True)
        ]
        tile = _beside(row)
        tile.thumbnail((small, small))
        tiles.append((word, tile))
    return _sheet(_beside(large), tiles, small)


def _beside(tiles: Sequence[Image.Image]) -> Image.Image:
    width = sum(tile.width + _MARGIN for tile in tiles) - _MARGIN
    sheet = Image.new("RGB", (width, max(tile.height for tile in tiles)), "white")
    left = 0
    for tile in tiles:
        sheet.paste(tile, (left, 0))
        left += tile.width + _MARGIN
    return sheet


def _sheet(large: Image.Image, tiles: Sequence[tuple[str, Image.Image]], edge: int) -> Image.Image:
    rows = [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]
    heights = [max(tile.height for _, tile in row) + _LINE + _MARGIN for row in rows]
    width = max([large.width, *(len(row) * (edge + _MARGIN) - _MARGIN for row in rows)])
    sheet = Image.new("RGB", (width, large.height + sum(heights) + _MARGIN * bool(rows)), "white")
    sheet.paste(large, (0, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_LINE - 4)
    top = large.height + _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, (word, tile) in enumerate(row):
            left = column * (edge + _MARGIN)
            sheet.paste(tile, (left, top))
            pen.text((left, top + tile.height), word[: edge // 7], fill="black", font=font)
        top += height
    return sheet
