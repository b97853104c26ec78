"""The shapes of the vision transformers' weights, for plans. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from llavakit_plugins.huggingface.hub import read_config
from llavakit_plugins.outlines.weights import (
    Dtype,
    NotPlain,
    Outline,
    Weight,
    layer_norm,
    linear,
    plain_config,
)
from llavakit_plugins.vision.options import (
    ChosenLayers,
    SiglipOptions,
    TransformersOptions,
    read_processor,
)
from llavakit_plugins.vision.square import TORCH_FILTERS

_COUNTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "image_size": 224,
}  # fmt: skip


class _TransformersOutline(ChosenLayers, Outline):
    """What CLIP's and SigLIP's transformers share."""

    default_tiling = "single"
    types: ClassVar[tuple[str, str]]
    counts: ClassVar[Mapping[str, int]]
    others: ClassVar[Mapping[str, Any]]
    options: TransformersOptions

    def __init__(
        self, options: TransformersOptions, config: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(options)
        if config is None:
            stated = read_config(options)
            config = plain_config(stated, self.counts, self.others, self.types)
        self.config = config
        self.prefix_tokens = type(self).prefix_tokens
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        self.image_size: int = config["image_size"]
        self.patch_size: int = config["patch_size"]
        if width % config["num_attention_heads"] or self.image_size < self.patch_size:
            raise NotPlain("sizes of the vision encoder that do not divide each other")
        self.choose(options, layers)
        self.width = width * len(self.depths)
        filtered = options.interpolation or read_processor(options).interpolation
        if options.backend == "torchvision" and (filtered or "bicubic") not in TORCH_FILTERS:
            raise NotPlain("its pixels are those of another backend")  # the encoder says so
        each = Dtype(4 if options.dtype == "float32" else 2)
        self.weights = {
            name: Weight(weight.shape, each)
            for name, weight in (self._outside() | self._layers(layers)).items()
        }

    def tokens(self, image_size: int) -> int:
        return self.kept + (image_size // self.patch_size) ** 2

    def with_options(self, options: TransformersOptions) -> Self:
        if options.dtype != self.options.dtype:
            return super().with_options(options)
        return type(self)(options, self.config)

    def _outside(self) -> dict[str, Weight]:
        """Return the weights that lie in no layer."""
        raise NotImplementedError

    def _layers(self, layers: int) -> dict[str, Weight]:
        width, inner = self.config["hidden_size"], self.config["intermediate_size"]
        found: dict[str, Weight] = {}
        for number in range(layers):
            name = f"encoder.layers.{number}"
            for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                found |= linear(f"{name}.self_attn.{part}", width, width)
            found |= layer_norm(f"{name}.layer_norm1", width)
            found |= _mlp(f"{name}.mlp", width, inner)
            found |= layer_norm(f"{name}.layer_norm2", width)
        return found

    def _embeddings(self) -> dict[str, Weight]:
        width, patch = self.config["hidden_size"], self.patch_size
        places = (self.image_size // patch) ** 2 + type(self).prefix_tokens
        pixels = (width, self.config["num_channels"], patch, patch)
        return {
            "embeddings.patch_embedding.weight": Weight(pixels),
            "embeddings.position_embedding.weight": Weight((places, width)),
        }


class ClipOutline(_TransformersOutline):
    name = "clip"
    Options = TransformersOptions
    prefix_tokens = 1
    types = ("clip_vision_model", "clip")
    counts: ClassVar[Mapping[str, int]] = {**_COUNTS, "patch_size": 32, "projection_dim": 512}
    others: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
        "initializer_range": 0.02, "initializer_factor": 1.0,
    }  # fmt: skip

    def _outside(self) -> dict[str, Weight]:
        width = self.config["hidden_size"]
        return {
            "embeddings.class_embedding": Weight((width,)),
            **self._embeddings(),
            **layer_norm("pre_layrnorm", width),
            **layer_norm("post_layernorm", width),
        }


class SiglipOutline(_TransformersOutline):
    name = "siglip"
    Options = SiglipOptions
    prefix_tokens = 0
    types = ("siglip_vision_model", "siglip")
    counts: ClassVar[Mapping[str, int]] = {**_COUNTS, "patch_size": 16}
    others: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
        "vision_use_head": True,
    }  # fmt: skip

    def _outside(self) -> dict[str, Weight]:
        width = self.config["hidden_size"]
        found = {
            **self._embeddings(),
            "embeddings.patch_embedding.bias": Weight((width,)),
            **layer_norm("post_layernorm", width),
        }
        if not self.config["vision_use_head"]:
            return found
        return {
            **found,
            "head.probe": Weight((1, 1, width)),
            "head.attention.in_proj_weight": Weight((3 * width, width)),
            "head.attention.in_proj_bias": Weight((3 * width,)),
            **linear("head.attention.out_proj", width, width),
            **layer_norm("head.layernorm", width),
            **_mlp("head.mlp", width, self.config["intermediate_size"]),
        }


def _mlp(name: str, width: int, inner: int) -> dict[str, Weight]:
    return linear(f"{name}.fc1", width, inner) | linear(f"{name}.fc2", inner, width)
