"""The names in a folder of ONNX graphs, as `@huggingface/transformers` expects them."""

from __future__ import annotations

from typing import Literal

VISION, EMBEDDINGS, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
GRAPHS = (VISION, EMBEDDINGS, DECODER)
Precision = Literal["fp32", "fp16", "int8", "q8", "q4"]
SUFFIXES: dict[str, str] = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
    "q8": "_quantized",
    "q4": "_q4",
}
"""What a precision adds to a file's name."""
REPORT = "export.json"
KEEP = "num_logits_to_keep"
"""The decoder's input that says how many of the last rows get logits; 0, its default, is all."""


def graph_file(graph: str, precision: str) -> str:
    """Return where a graph lies in the folder."""
    return f"onnx/{graph}{SUFFIXES[precision]}.onnx"


def cache_names(layers: int, prefix: str = "past_key_values") -> list[str]:
    """Return the names of the key-value cache's tensors, keys and values in turn."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
