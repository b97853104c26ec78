"""SigLIP's vision transformer (arXiv 2303.15343), also SigLIP 2's of fixed resolution
(arXiv 2502.14786)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from llavakit_plugins.vision.options import SiglipOptions as SiglipOptions
from llavakit_plugins.vision.vision_transformer import TransformersEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Siglip(TransformersEncoder):
    """transformers' SiglipVisionModel: no class token, every token is a patch."""

    name = "siglip"
    Options = SiglipOptions
    mean = std = (0.5, 0.5, 0.5)  # pixels from -1 to 1, as it was trained

    @classmethod
    def architecture(cls) -> type[PreTrainedModel]:
        from transformers import SiglipVisionModel

        return SiglipVisionModel

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        # no norm in front of the layers, unlike CLIP
        hidden_BPD: Tensor = self.inner.embeddings(pixels_BCHW)
        return hidden_BPD
