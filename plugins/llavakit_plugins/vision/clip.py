"""CLIP's vision transformer (arXiv 2103.00020), with features of the layer before the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL.Image import Image
from pydantic import Field
from torch import Tensor

from llavakit import ModelError, VisionEncoder
from llavakit_plugins.huggingface import PretrainedOptions, missing_source, quietly, read_config
from llavakit_plugins.preprocessing import MEAN, STD, Square, to_square


class ClipOptions(PretrainedOptions):
    layer: int = -2
    """Whose output to use, as in `hidden_states[layer]`: 0 is the embedding, -1 the last."""
    aspect: Literal["crop", "pad"] = "crop"
    """Cut the middle square (the paper), or pad to a square with the mean colour (v1.5)."""
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32")


class Clip(VisionEncoder):
    """transformers' CLIPVisionModel. Layers behind the chosen one are kept but not computed."""

    name = "clip"
    Options = ClipOptions
    prefix_tokens = 1

    def __init__(self, options: ClipOptions, model: Any = None) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        if model is None:
            table = {k: v for k, v in read_config(options).items() if k != "model_type"}
            model = CLIPVisionModel(CLIPVisionConfig(**table)).to(getattr(torch, options.dtype))
        self.model = model
        config = self.model.config
        depth: int = config.num_hidden_layers
        if not -depth - 1 <= options.layer <= depth:
            raise ModelError(
                f"vision encoder `clip` has {depth} layers, so `layer = {options.layer}` names "
                f"none; use {-depth - 1} to {depth}"
            )
        self.depth = options.layer % (depth + 1)
        self.width: int = config.hidden_size
        self.image_size: int = config.image_size
        self.patch_size: int = config.patch_size
        self.square = Square(self.image_size, options.aspect, options.mean, options.std)

    @classmethod
    def create(cls, options: ClipOptions, **context: Any) -> Self:
        if options.source is None:
            return cls(options, **context)
        return cls(options, _pretrained(options.source, options))

    @classmethod
    def load(cls, options: ClipOptions, folder: Path, **context: Any) -> Self:
        return cls(options, _pretrained(str(folder), options))

    def save(self, folder: Path) -> None:
        with quietly():
            self.model.save_pretrained(folder)

    @classmethod
    def missing(cls, options: ClipOptions) -> str | None:
        return missing_source("vision encoder", options)

    def tokens(self, image_size: int) -> int:
        return (image_size // self.patch_size) ** 2

    def prepare(self, image: Image) -> Tensor:
        return to_square(image, self.square)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features `[B, 1 + P, D]`, the class token first."""
        inner = getattr(self.model, "vision_model", self.model)
        hidden_BPD = inner.pre_layrnorm(inner.embeddings(pixels_BCHW))
        for layer in inner.encoder.layers[: self.depth]:
            hidden_BPD = layer(hidden_BPD, attention_mask=None)
        features_BPD: Tensor = hidden_BPD
        return features_BPD


def _pretrained(source: str, options: ClipOptions) -> Any:
    from transformers import CLIPVisionModel

    revision = options.revision if source == options.source else None
    with quietly():
        return CLIPVisionModel.from_pretrained(
            source, revision=revision or "main", dtype=getattr(torch, options.dtype)
        )
