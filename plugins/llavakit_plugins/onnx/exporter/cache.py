"""Keeps a decoder's keys and values in 8 bits: a quarter of the cache's memory.

onnxruntime's GroupQueryAttention computes with them as they are, so that a row of an answer reads a
long past in half the time; it takes one fixed scale for each channel, which is found when the model
is exported.

Shapes: G key-value heads, K head dimension, P rows of a prompt, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from llavakit import pack
from llavakit.contracts.packing import KVCache, Packing
from llavakit_plugins.checkpoints.parity import Case
from llavakit_plugins.onnx.exporter.fusion import MICROSOFT
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
    """Change a decoder with GroupQueryAttention so that its cache is int8; return it.

    The operator widens 8 bits anew for each row that attends to them. That is the fastest way for
    one row; in prompts it takes three to four times as long as attention in float. So several rows
    have their keys and values rounded in front of it, and attend in float to the same numbers.
    """
    graph = model.graph
    places = {name: number for number, name in enumerate(cache_names(len(scales) // 2))}
    held = {*places, *cache_names(len(scales) // 2, "present")}
    for value in (*graph.input, *graph.output):
        if value.name in held:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
            *_, groups, _, width = (size.dim_value for size in value.type.tensor_type.shape.dim)
    del graph.value_info[:]  # says float of what is int8 now
    tables: dict[str, npt.ArrayLike] = {
        "first": [0], "end": [np.iinfo(np.int64).max], "rows": [2], "one": 1,
        "heads": [0, 0, groups, width], "unit": np.float32(1), "zero": np.int8(0),
    }  # fmt: skip
    for number, scale in enumerate(scales):
        tables[f"{number}.scale"] = scale
        tables[f"{number}.step"] = scale.reshape(1, groups, 1, width)
    nodes = [
        _node("Shape", ["inputs_embeds"], "cache.new", start=1, end=2),
        _node("Shape", ["attention_mask"], "cache.total", start=1, end=2),
        _node("Sub", ["cache.total", "cache.new"], "cache.known"),
        _node("Squeeze", ["cache.new"], "cache.count"),
        _node("Greater", ["cache.count", "cache.one"], "cache.several"),
    ]
    for node in graph.node:
        if node.op_type == _OPERATOR:
            heads = next(one.i for one in node.attribute if one.name == "num_heads")
            tables["sizes"] = [heads * width, groups * width, groups * width]
            nodes.append(_either(node, places[node.input[3]]))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(table), f"cache.{name}")
        for name, table in tables.items()
    )
    return model


def _either(node: onnx.NodeProto, number: int) -> onnx.NodeProto:
    """Return an attention that reads the 8-bit cache for one row, and a widened one for several.

    `number` is that of its keys among the scales.
    """
    one = _copy(node)
    one.input.extend([""] * (12 - len(one.input)))
    one.input.extend(f"cache.{number + n}.scale" for n in range(2))
    for name in ("k_quant_type", "v_quant_type"):
        one.attribute.append(onnx.helper.make_attribute(name, "PER_CHANNEL"))
    one.attribute.append(onnx.helper.make_attribute("kv_cache_bit_width", 8))
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.INT8)
    branches = {}
    for name, nodes in (("one", [one]), ("several", _several(node, number))):
        made = [f"{node.name}.{name}.{output}" for output in node.output]
        for each in nodes:
            each.output[:] = [
                made[list(node.output).index(output)] if output in node.output else output
                for output in each.output
            ]
        values = [
            onnx.helper.make_tensor_value_info(output, kind, None)
            for output, kind in zip(made, kinds, strict=True)
        ]
        branches[name] = onnx.helper.make_graph(nodes, name, [], values)
    return onnx.helper.make_node(
        "If", ["cache.several"], list(node.output), f"{node.name}.rows",
        then_branch=branches["several"], else_branch=branches["one"],
    )  # fmt: skip


def _several(node: onnx.NodeProto, number: int) -> list[onnx.NodeProto]:
    """Return the nodes of an attention in float to keys and values that are rounded to 8 bits."""
    attend, nodes = _copy(node), []
    if not node.input[1]:  # queries, keys and values are one product
        parts = [f"{node.name}.{part}" for part in "qkv"]
        nodes.append(_node("Split", [node.input[0], "cache.sizes"], *parts, axis=-1))
        attend.input[:3] = parts
    attributes = {one.name: one.i for one in node.attribute}
    if attributes.get("do_rotary"):  # keys are held as they are behind their rotation
        for n, heads in enumerate(("num_heads", "kv_num_heads")):
            taken = [attend.input[n], "cache.known", *node.input[7:9]]
            attend.input[n] = f"{node.name}.rotated.{n}"
            turn = _node("RotaryEmbedding", taken, attend.input[n], num_heads=attributes[heads])
            turn.domain = MICROSOFT
            nodes.append(turn)
        attend.input[7:9] = ["", ""]
        for one in attend.attribute:
            if one.name == "do_rotary":
                one.i = 0
    behind = []
    for n in range(2):
        past, present, place = node.input[3 + n], node.output[1 + n], number + n
        steps, levels, known = (f"{past}.{name}" for name in ("steps", "levels", "known"))
        attend.output[1 + n] = f"{present}.float"
        nodes += [
            _node("Div", [attend.input[1 + n], f"cache.{place}.scale"], steps),
            _node("QuantizeLinear", [steps, "cache.unit", "cache.zero"], levels),
            *_widen(levels, f"cache.{place}.scale", f"{levels}.float"),
            _node("Slice", [past, "cache.first", "cache.known", "cache.rows"], known),
            *_widen(known, f"cache.{place}.step", f"{known}.float"),
        ]
        attend.input[1 + n], attend.input[3 + n] = f"{levels}.float", f"{known}.float"
        # a cache that is written in place may be longer than what it holds
        rest, by_rows, by_heads = (f"{past}.{name}" for name in ("rest", "by_rows", "by_heads"))
        behind += [
            _node("Reshape", [levels, "cache.heads"], by_rows),
            _node("Transpose", [by_rows], by_heads, perm=[0, 2, 1, 3]),
            _node("Slice", [past, "cache.total", "cache.end", "cache.rows"], rest),
            _node("Concat", [known, by_heads, rest], present, axis=2),
        ]
    return [*nodes, attend, *behind]


def _widen(levels: str, step: str, name: str) -> list[onnx.NodeProto]:
    return [
        _node("Cast", [levels], f"{name}.levels", to=onnx.TensorProto.FLOAT),
        _node("Mul", [f"{name}.levels", step], name),
    ]


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _node(operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(operator, inputs, list(outputs), outputs[0], **attributes)
