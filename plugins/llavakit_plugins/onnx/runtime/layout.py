"""The file and tensor names in a folder of ONNX graphs, as transformers.js
(`@huggingface/transformers`) expects them."""

from __future__ import annotations

from typing import Literal

VISION, EMBEDDINGS, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
GRAPHS = (VISION, EMBEDDINGS, DECODER)
CONNECTOR = "connector"
"""A graph of its own only where the tiling pools features in front of it; then the vision encoder's
has none. transformers.js knows no such graph: our own runtime reads these folders."""
SMALL_CACHE = "decoder_int8_cache"
"""The decoder with a key-value cache of 8 bits, for our own runtime on a CPU, where an export wrote
one beside DECODER. It reads its weights from DECODER's file."""
Precision = Literal["fp32", "fp16", "int8", "q8", "q4"]
SUFFIXES: dict[str, str] = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
    "q8": "_quantized",
    "q4": "_q4",
}
"""The suffix of a file's name for each precision."""
FEATURES, VISUAL_EMBEDS = "features", "visual_embeds"
"""What the connector's graph takes and gives."""
REPORT = "export.json"
KEEP = "num_logits_to_keep"
"""The decoder's input for the number of last rows that get logits; 0, its default, means all."""


def graph_file(graph: str, precision: str) -> str:
    """Return the path of a graph within the folder."""
    return f"onnx/{graph}{SUFFIXES[precision]}.onnx"


def cache_names(layers: int, prefix: str = "past_key_values") -> list[str]:
    """Return the tensor names of the key-value cache: for each layer its keys, then its values."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
