"""A connector that gives one visual token an image: the mean of its patches."""

from __future__ import annotations

from torch import Tensor, nn

from llavakit import Connector, Options, hookimpl


class Mean(Connector):
    """The mean of the patches, projected."""

    name = "mean"

    def __init__(self, options: Options, *, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(vision_width, language_width)

    def tokens(self, patches: int) -> int:
        return 1

    def forward(self, features_BPD: Tensor) -> Tensor:
        embedding_B1E: Tensor = self.project(features_BPD.mean(dim=1, keepdim=True))
        return embedding_B1E


@hookimpl
def llava_connectors() -> list[type[Connector]]:
    return [Mean]
