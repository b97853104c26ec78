"""A connector that reduces visual tokens: the patch grid is averaged to a smaller one, then
projected.

Shapes: B images, P patches, D vision width, H and W edges of the patch grid.
"""

from __future__ import annotations

from math import isqrt

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from llavakit import ModelError
from llavakit.contracts.packing import Stream
from llavakit_plugins.connectors.mlp import Mlp, MlpOptions


class PoolOptions(MlpOptions):
    """Options of `pool`."""

    grid: int = Field(default=12, ge=1)
    """Edge of the smaller grid: 12 gives 144 tokens for an image."""


class Pool(Mlp):
    """Averages the grid of patches to `grid` x `grid`, then projects as `mlp` does.

    If `grid` does not divide the edge, neighbouring averages share patches, so that no patch is
    left out.
    """

    name = "pool"
    Options = PoolOptions

    def __init__(self, options: PoolOptions, *, vision_width: int, language_width: int) -> None:
        super().__init__(options, vision_width=vision_width, language_width=language_width)
        self.grid = options.grid

    def tokens(self, patches: int) -> int:
        """Return the tokens of an image. Raises ModelError if the patches form no such grid."""
        self._edge(patches)
        return self.grid**2

    def forward(self, features_BPD: Tensor) -> Tensor:
        return super().forward(self._pooled(features_BPD))

    def project_into(self, features_BPD: Tensor, stream: Stream) -> Tensor:
        if stream.embedding_VE is None:
            return super().project_into(features_BPD, stream)
        return super().project_into(self._pooled(features_BPD), stream)

    def _pooled(self, features_BPD: Tensor) -> Tensor:
        edge = self._edge(features_BPD.shape[1])
        grid_BDHW = features_BPD.transpose(1, 2).unflatten(2, (edge, edge))
        # adaptive: `grid` need not divide the edge
        return F.adaptive_avg_pool2d(grid_BDHW, self.grid).flatten(2).transpose(1, 2)

    def _edge(self, patches: int) -> int:
        edge = isqrt(patches)  # in integers: a rounded root of a large count may be one off
        if edge**2 != patches:
            raise ModelError(
                f"connector `pool` needs a square grid, but an image has {patches} visual tokens; "
                'where the encoder keeps its class token, set `select = "patch"`'
            )
        if self.grid > edge:
            raise ModelError(
                f"connector `pool` cannot make {self.grid} x {self.grid} tokens of an image's "
                f"{edge} x {edge}; choose `grid` up to {edge}"
            )
        return edge
