"""The options of connectors. Without torch, as plans need them."""

from __future__ import annotations

from math import isqrt

from pydantic import Field

from llavakit import ModelError
from llavakit_plugins.huggingface.products import ProductOptions


class LinearOptions(ProductOptions):
    """Options of `linear`."""


class MlpOptions(ProductOptions):
    """Options of `mlp`."""

    depth: int = Field(default=2, ge=1)
    """Number of linear layers; 2 is LLaVA-1.5's `mlp2x_gelu`."""


class PoolOptions(MlpOptions):
    """Options of `pool`."""

    grid: int = Field(default=12, ge=1)
    """Edge of the smaller grid: 12 gives 144 tokens for an image."""


def smaller_grid(patches: int, grid: int) -> int:
    """Return the edge of a grid of patches. Raises ModelError if it has none, or a shorter one."""
    edge = isqrt(patches)  # in integers: a rounded root of a large count may be one off
    if edge**2 != patches:
        raise ModelError(
            f"connector `pool` needs a square grid, but an image has {patches} visual tokens; "
            'where the encoder keeps its class token, set `select = "patch"`'
        )
    if grid > edge:
        raise ModelError(
            f"connector `pool` cannot make {grid} x {grid} tokens of an image's "
            f"{edge} x {edge}; choose `grid` up to {edge}"
        )
    return edge
