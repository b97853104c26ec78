"""Keeps a decoder's keys and values in 8 bits: a quarter of the cache's memory.

onnxruntime's GroupQueryAttention computes with them as they are, so that a CPU reads a long past in
half the time; it takes one fixed scale for each channel, which is found when the model is
exported.

Shapes: G key-value heads, K head dimension, P rows of a prompt, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from llavakit import pack
from llavakit.contracts.packing import KVCache, Packing
from llavakit_plugins.checkpoints.parity import Case
from llavakit_plugins.onnx.runtime.layout import cache_names

if TYPE_CHECKING:
    from llavakit import LlavaModel

Scales = list[npt.NDArray[np.float32]]
"""A scale for each channel `[G * K]`; for each layer of its keys, then of its values."""
_MARGIN = 1.5
"""How much larger than those that were seen a key or value may be before it is cut off."""
_TOKENS = 512
_OPERATOR = "GroupQueryAttention"
EIGHT_BIT_CACHES = ("int8", "q8", "q4")
"""Precisions whose cache may be int8: those that compute in float32."""


def find_scales(model: LlavaModel, tried: Sequence[Case]) -> Scales:
    """Return what a step of an 8-bit number is worth in each channel.

    Counted are prompts with images, and rows of tokens drawn from the whole vocabulary. A position
    rotates pairs of a key's channels: the length of a pair is counted, which is the same at every
    position, and not its two numbers.
    """
    layers, groups, width = model.language.cache_shape()
    largest = torch.zeros(2 * layers, groups, width)
    with torch.inference_mode():
        for rows_PE in (*(embed_prompt(model, case) for case in tried), _any_tokens(model)):
            for number, held_1GPK in enumerate(held_of(model, rows_PE)):
                largest[number] = largest[number].maximum(held_1GPK[0].abs().amax(1))
                if number % 2 == 0:
                    pairs = torch.hypot(*held_1GPK[0].chunk(2, dim=-1)).amax(1).repeat(1, 2)
                    largest[number] = largest[number].maximum(pairs)
    steps = (largest * (_MARGIN / 127)).flatten(1)
    steps = torch.where(steps > 0, steps, 1.0)  # a channel that is always 0 has any scale
    return [one.numpy() for one in steps]


def embed_prompt(model: LlavaModel, case: Case) -> Tensor:
    """Return the embeddings `[P, E]` of a prompt with its images."""
    encoded = model.prompt(case.text, case.images, raw=case.raw)
    batch = pack([encoded], [0], model.visual_tokens)
    pixels = model.prepare(case.images)
    return model.embed(batch, None if pixels is None else model.features(pixels))


def held_of(model: LlavaModel, rows_PE: Tensor) -> list[Tensor]:
    """Return the keys and values `[1, G, P, K]` of a prompt, layer by layer."""
    count = len(rows_PE)
    cache = KVCache(model.language.cache_shape()[0], [count])
    model.language.hidden(rows_PE, replace(Packing.of([count]), cache=cache))
    pairs = zip(cache.keys, cache.values, strict=True)
    return [held[:, :, :count] for pair in pairs for held in pair if held is not None]


def _any_tokens(model: LlavaModel) -> Tensor:
    """Return the embeddings `[P, E]` of tokens that are drawn at random, always the same ones."""
    draw = torch.Generator().manual_seed(0)
    count = min(_TOKENS, model.language.max_length)
    return model.language.embed(
        torch.randint(model.language.head.weight.shape[0], (count,), generator=draw)
    )


def quantise(model: onnx.ModelProto, scales: Scales) -> onnx.ModelProto:
    """Change a decoder with GroupQueryAttention so that its cache is int8; return it."""
    graph = model.graph
    places = {name: number for number, name in enumerate(cache_names(len(scales) // 2))}
    held = {*places, *cache_names(len(scales) // 2, "present")}
    for value in (*graph.input, *graph.output):
        if value.name in held:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    del graph.value_info[:]  # says float of what is int8 now
    for number, scale in enumerate(scales):
        graph.initializer.append(onnx.numpy_helper.from_array(scale, f"cache.{number}.scale"))
    for node in graph.node:
        if node.op_type == _OPERATOR:
            first = places[node.input[3]]
            node.input.extend([""] * (12 - len(node.input)))
            node.input.extend(f"cache.{number}.scale" for number in (first, first + 1))
            for name in ("k_quant_type", "v_quant_type"):
                node.attribute.append(onnx.helper.make_attribute(name, "PER_CHANNEL"))
            node.attribute.append(onnx.helper.make_attribute("kv_cache_bit_width", 8))
    return model
