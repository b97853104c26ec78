"""A connector that reduces visual tokens: the patch grid is averaged to a smaller one, then
projected.

Shapes: B images, P patches, D vision width, H and W edges of the patch grid.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llavakit.contracts.packing import Stream
from llavakit_plugins.connectors.mlp import Mlp
from llavakit_plugins.connectors.options import PoolOptions as PoolOptions, smaller_grid


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
        smaller_grid(patches, self.grid)
        return self.grid**2

    def forward(self, features_BPD: Tensor) -> Tensor:
        return super().forward(self._pooled(features_BPD))

    def project_into(self, features_BPD: Tensor, stream: Stream) -> Tensor:
        if stream.embedding_VE is None:
            return super().project_into(features_BPD, stream)
        return super().project_into(self._pooled(features_BPD), stream)

    def _pooled(self, features_BPD: Tensor) -> Tensor:
        edge = smaller_grid(features_BPD.shape[1], self.grid)
        grid_BDHW = features_BPD.transpose(1, 2).unflatten(2, (edge, edge))
        # adaptive: `grid` need not divide the edge
        return F.adaptive_avg_pool2d(grid_BDHW, self.grid).flatten(2).transpose(1, 2)
