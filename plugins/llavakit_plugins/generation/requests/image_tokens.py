"""How many tokens an image counts as, by the formulas that OpenAI publishes for its models.

Source: platform.openai.com/docs/guides/images-vision, "Calculating costs", as of 2025-08. Two
families: one counts squares of 512 pixels of an image that was made smaller, the other patches of
32 pixels. Models that the page does not name, and other services, have no formula here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from llavakit_plugins.generation.requests.prices import find_version

T = TypeVar("T")
_TILES = {
    "gpt-4o": (85, 170),
    "gpt-4.1": (85, 170),
    "gpt-4.5-preview": (85, 170),
    "gpt-4-turbo": (85, 170),
    "gpt-4o-mini": (2833, 5667),
    "gpt-5": (70, 140),
    "gpt-5-chat-latest": (70, 140),
    "o1": (75, 150),
    "o1-pro": (75, 150),
    "o3": (75, 150),
}
"""Tokens of the image itself, and of each of its squares."""
_PATCHES = {
    "gpt-5-mini": 1.62,
    "gpt-5-nano": 2.46,
    "gpt-4.1-mini": 1.62,
    "gpt-4.1-nano": 2.46,
    "o4-mini": 1.72,
}
"""Tokens of a patch."""

_FITS, _SHORT, _TILE = 2048, 768, 512  # pixels
_PATCH, _MOST_PATCHES = 32, 1536


def image_tokens(model: str, width: int, height: int, *, low: bool = False) -> int | None:
    """Return the tokens of an image of so many pixels; None where no formula is published.

    `low` is the detail "low", which makes no squares. Dated names are those of their models.
    """
    if found := _find(_TILES, model):
        base, tile = found
        return base if low else base + tile * _tiles(width, height)
    if factor := _find(_PATCHES, model):
        return math.ceil(factor * _patches(width, height))
    return None


def _tiles(width: int, height: int) -> int:
    """Return how many squares cover the image that is seen: it is made smaller, never larger."""
    scale = min(1.0, _FITS / max(width, height))
    scale *= min(1.0, _SHORT / (scale * min(width, height)))
    # rounded first: 512.0000001 of floating point would count as one square more
    across, down = (math.ceil(round(side * scale, 6) / _TILE) for side in (width, height))
    return across * down


def _patches(width: int, height: int) -> int:
    """Return how many patches cover the image; one of too many is made smaller to whole patches."""
    across, down = math.ceil(width / _PATCH), math.ceil(height / _PATCH)
    if across * down <= _MOST_PATCHES:
        return across * down
    scale = math.sqrt(_PATCH**2 * _MOST_PATCHES / (width * height))
    wide, high = width * scale / _PATCH, height * scale / _PATCH
    # the page's second step: a whole number of patches along the side that is cut most
    scale *= min(math.floor(wide) / wide, math.floor(high) / high)
    across, down = (math.ceil(round(side * scale / _PATCH, 6)) for side in (width, height))
    return min(across * down, _MOST_PATCHES)


def _find(table: Mapping[str, T], model: str) -> T | None:
    name = find_version(table, model)
    return None if name is None else table[name]
