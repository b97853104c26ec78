"""The options of language models. Without torch, as plans need them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llavakit import Options
from llavakit_plugins.huggingface.hub import PretrainedOptions
from llavakit_plugins.huggingface.products import ProductOptions

LLAMA_TYPES = ("llama", "llava", "llava_llama")
"""What configurations call LLaMA's architecture; the last two stand in the original LLaVA's."""
NF4_BYTES = 4.127 / 8
"""Bytes of one NF4 weight: 4 bits, and its share of the scales, which are quantised, too (QLoRA,
arXiv 2305.14314, section 3)."""


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


class LoraOptions(Options):
    """Adapters that are trained instead of the weights. The defaults are the original LLaVA's."""

    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    """Layers with an adapter, such as `q_proj`; every linear layer but the head where empty."""


class LanguageOptions(PretrainedOptions, ProductOptions):
    """Options of every language model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    """Device that weights are read to, such as `cuda`; by default the CPU, to be moved later."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest sequence in tokens, images included; by default the configuration's."""
    legacy: bool | None = None
    """Whether a LLaMA tokenizer adds a space behind special tokens, as it did when LLaVA's own
    weights were trained; by default as the tokenizer's configuration says."""
    lora: LoraOptions | None = None
    """Adapters that are trained instead of the weights; by default all weights are trained."""
    quantize: Literal["nf4"] | None = None
    """Keep the linear layers' weights in 4 bits (QLoRA, arXiv 2305.14314); then only adapters can
    be trained."""


class VicunaOptions(LanguageOptions):
    """Options of `vicuna`."""
