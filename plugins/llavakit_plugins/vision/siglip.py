"""SigLIP's vision transformer (arXiv 2303.15343), also SigLIP 2's of fixed resolution
(arXiv 2502.14786)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from llavakit_plugins.vision.preprocessing import Aspect
from llavakit_plugins.vision.vision_transformer import TransformersEncoder, TransformersOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SiglipOptions(TransformersOptions):
    """Options of `siglip`. SigLIP was trained on squashed images, hence the other default."""

    aspect: Aspect = "squash"


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
