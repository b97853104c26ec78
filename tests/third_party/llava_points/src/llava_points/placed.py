"""A connector that is told how many patches there will be: it learns where each of them is."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from llavakit import Connector, ModelError, Options


class Placed(Connector):
    """A projection, and a learned vector for each row and each column of the patches."""

    name = "placed"

    def __init__(
        self, options: Options, *, vision_width: int, language_width: int, patches: int
    ) -> None:
        super().__init__()
        self.edge = isqrt(patches)
        if self.edge**2 != patches:
            raise ModelError(f"`placed` takes a square of patches, not {patches}; use `mlp`")
        self.project = nn.Linear(vision_width, language_width)
        self.rows_RE = nn.Parameter(torch.randn(self.edge, language_width) * 0.02)
        self.columns_CE = nn.Parameter(torch.randn(self.edge, language_width) * 0.02)

    def forward(self, features_BPD: Tensor) -> Tensor:
        places_PE = (self.rows_RE[:, None] + self.columns_CE).flatten(0, 1)
        embeddings_BPE: Tensor = self.project(features_BPD) + places_PE
        return embeddings_BPE
