"""transformers' classes of LLaVA, and what a config.json of each leaves out where it is usual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llavakit.contracts.data import IMAGE

VIDEO = "<video>"
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
"""CLIP ViT-L/14 at 336 pixels."""
_SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    "vision_use_head": False,
}  # fmt: skip
"""SigLIP SO400M/14 at 384 pixels, without its last layer."""
_NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_ALL = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


class Family(NamedTuple):
    """One of transformers' LLaVAs."""

    model_type: str
    prefix: str  #: What the names of its classes begin with.
    vision: Mapping[str, Any] = _CLIP
    text: str = "llama"  #: The `model_type` of the language model.
    layer: int = -2  #: `vision_feature_layer`.
    strategy: str = "default"  #: `vision_feature_select_strategy`.
    pinpoints: Sequence[tuple[int, int]] = ()  #: [height, width]; of one that has tiles.

    def network(self) -> Any:
        """Return transformers' class."""
        import transformers

        return getattr(transformers, self.architecture)

    @property
    def tokens(self) -> list[str]:
        """The tokens that stand for images and videos."""
        return [IMAGE, VIDEO] if self in (NEXT_VIDEO, ONEVISION) else [IMAGE]

    @property
    def architecture(self) -> str:
        return f"{self.prefix}ForConditionalGeneration"


LLAVA = Family("llava", "Llava")
NEXT = Family("llava_next", "LlavaNext", pinpoints=_NEXT)
ONEVISION = Family(
    "llava_onevision", "LlavaOnevision", _SO400M, "qwen2", -1, "full", pinpoints=_ALL
)
NEXT_VIDEO = Family("llava_next_video", "LlavaNextVideo", pinpoints=_NEXT)
FAMILIES = {family.model_type: family for family in (LLAVA, NEXT, NEXT_VIDEO, ONEVISION)}
