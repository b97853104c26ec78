"""The options that every language model has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llavakit_plugins.huggingface.hub import PretrainedOptions
from llavakit_plugins.language.lora import LoraOptions


class LanguageOptions(PretrainedOptions):
    """Options of every language model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    """Where weights are read to, such as `cuda`; into the CPU's memory first where absent."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest sequence in tokens, images included; the configuration's where absent."""
    legacy: bool | None = None
    """Whether a LLaMA tokenizer puts a space behind special tokens, as it did for LLaVA's own
    weights; as the tokenizer's configuration says where absent."""
    lora: LoraOptions | None = None
    """Adapters that learn in place of the weights; without them all weights learn."""
    quantize: Literal["nf4"] | None = None
    """Hold the linear layers' weights in 4 bits (QLoRA); then only adapters can learn."""
