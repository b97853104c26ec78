"""CLIP's vision transformer (arXiv 2103.00020).

By default features come from the layer before the last, as in the original LLaVA's code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from llavakit_plugins.vision.vision_transformer import TransformersEncoder, TransformersOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ClipOptions = TransformersOptions


class Clip(TransformersEncoder):
    """transformers' CLIPVisionModel: one class token, then the patches."""

    name = "clip"
    prefix_tokens = 1

    @classmethod
    def architecture(cls) -> type[PreTrainedModel]:
        from transformers import CLIPVisionModel

        return CLIPVisionModel

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        # "layrnorm": transformers keeps this misspelt name, since checkpoints have it
        hidden_BPD: Tensor = self.inner.pre_layrnorm(self.inner.embeddings(pixels_BCHW))
        return hidden_BPD
