"""The connectors of LLaVA (one linear layer) and LLaVA-1.5 (two layers with GELU)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from llavakit import Connector, Options


class Linear(Connector):
    """The paper's connector: one linear layer W (section 4.1)."""

    name = "linear"

    def __init__(self, options: Options, *, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.layers = nn.Linear(vision_width, language_width)

    def forward(self, features_BPD: Tensor) -> Tensor:
        embeddings_BPE: Tensor = self.layers(features_BPD)
        return embeddings_BPE


class MlpOptions(Options):
    depth: int = Field(default=2, ge=1)
    """Number of linear layers; 2 is LLaVA-1.5's `mlp2x_gelu`."""


class Mlp(Connector):
    """Linear layers with exact GELU between them (LLaVA-1.5, arXiv 2310.03744)."""

    name = "mlp"
    Options = MlpOptions

    def __init__(self, options: MlpOptions, *, vision_width: int, language_width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(vision_width, language_width)]
        for _ in range(1, options.depth):
            layers += [nn.GELU(), nn.Linear(language_width, language_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features_BPD: Tensor) -> Tensor:
        embeddings_BPE: Tensor = self.layers(features_BPD)
        return embeddings_BPE
