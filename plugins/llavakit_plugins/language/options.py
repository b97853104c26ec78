"""The options that every language model has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llavakit_plugins.huggingface.hub import PretrainedOptions
from llavakit_plugins.huggingface.products import ProductOptions
from llavakit_plugins.language.lora import LoraOptions


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
