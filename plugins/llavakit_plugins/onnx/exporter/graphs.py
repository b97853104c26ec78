"""Traces the graphs of a LLaVA: vision encoder with connector, embeddings, decoder.

A connector in front of which the tiling pools features is a graph of its own.

Shapes: I images, P' visual tokens of an image, D width of features, Q rows that a connector reads,
E width, B sequences, T rows, V vocabulary, G key-value heads, K head dimension, L = past + T.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from llavakit import ModelError
from llavakit_plugins.onnx.exporter.attention import Attention, Trace, attention_of, own_forward
from llavakit_plugins.onnx.exporter.rows import cut_early
from llavakit_plugins.onnx.runtime.layout import (
    CONNECTOR,
    DECODER,
    EMBEDDINGS,
    FEATURES,
    KEEP,
    VISION,
    VISUAL_EMBEDS,
    cache_names,
)

if TYPE_CHECKING:
    from llavakit import LlavaModel

OPSET = 23  # the first with RMSNormalization and RotaryEmbedding, which the fusion looks for


class _Vision(nn.Module):
    """Encoder and connector as one module."""

    def __init__(self, model: LlavaModel, *, connector: bool = True) -> None:
        super().__init__()
        self.vision, self.prefix = model.vision, model.vision.prefix_tokens
        self.connector = model.connector if connector else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.connector(self.vision(pixel_values)[:, self.prefix :])
        return features


class _Decoder(nn.Module):
    """The language model from embeddings to logits, with the key-value cache as plain tensors."""

    def __init__(self, model: LlavaModel, attention: Attention) -> None:
        super().__init__()
        self.causal, self.language, self.attention = _causal(model), model.language, attention

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
        keep: Tensor,
    ) -> tuple[Tensor, ...]:
        trace = Trace(self.attention, attention_mask, past)
        with attention_of(self.causal, trace) as cache:
            hidden = self.causal.base_model(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        # Keeps the last `keep` rows: a Slice node, since torch.export cannot trace an index that is
        # a tensor's value. A start of 0 keeps all rows, which is the default.
        whole = torch.tensor([np.iinfo(np.int64).max])
        rows = torch.onnx.ops.symbolic(
            "Slice",
            (hidden, -keep.reshape(1), whole, torch.tensor([1])),
            dtype=hidden.dtype,
            shape=hidden.shape,
        )
        present = [tensor for layer in range(len(past)) for tensor in trace.present[layer]]
        return self.language.logits(rows), *present


def trace_vision(model: LlavaModel) -> ir.Model:
    """Return the graph pixel_values `[I, 3, H, W]` -> image_features `[I, P', E]`.

    Where features are pooled, the graph gives them, `[I, P', D]`, without the connector. Raises
    ModelError, which names encoder or connector, if one of them cannot be traced.
    """
    size = model.vision.image_size
    # two images: torch.export would take a number of 1 for a constant
    pixels = (torch.zeros(2, 3, size, size),)
    batch = torch.export.Dim("images")

    apart = pools_features(model)

    def attempt(module: nn.Module) -> ir.Model:
        return _trace(module, pixels, ({0: batch},), ["pixel_values"], ["image_features"])

    try:
        graph = attempt(_Vision(model, connector=not apart).eval())
    except ModelError as error:
        # which of the two is it? the connector, if the encoder alone can be traced
        part = ("connector", model.connector.name)
        try:
            attempt(_Vision(model, connector=False).eval())
        except ModelError:
            part = ("vision encoder", model.vision.name)
        raise ModelError(f"{part[0]} `{part[1]}` {error}") from error
    _shape(graph.graph.inputs[0], ["images", 3, size, size])
    features, width = graph.graph.outputs[0], (model.vision if apart else model.language).width
    _shape(features, ["images", model.visual_tokens, width])
    return graph


def trace_connector(model: LlavaModel) -> ir.Model:
    """Return the graph features `[I, Q, D]` -> visual_embeds `[I, Q, E]`.

    Raises ModelError, which names the connector, if it cannot be traced.
    """
    images, rows = torch.export.Dim("images"), torch.export.Dim("rows")
    features = (torch.zeros(2, 3, model.vision.width),)
    try:
        graph = _trace(
            model.connector, features, ({0: images, 1: rows},), [FEATURES], [VISUAL_EMBEDS]
        )
    except ModelError as error:
        raise ModelError(f"connector `{model.connector.name}` {error}") from error
    _shape(graph.graph.inputs[0], ["images", "rows", model.vision.width])
    _shape(graph.graph.outputs[0], ["images", "rows", model.language.width])
    return graph


def embed_graph(model: LlavaModel, rows: int) -> ir.Model:
    """Return the graph input_ids `[B, T]` -> inputs_embeds `[B, T, E]`.

    Its table has at least `rows` rows, since clients also look up `<image>`; the added rows are 0
    and are replaced by image features.
    """
    with torch.inference_mode():
        known = model.language.head.weight.shape[0]
        table_VE = model.language.embed(torch.arange(known)).float().numpy()
    missing = np.zeros((max(0, rows - known), table_VE.shape[1]), np.float32)
    whole_VE = np.concatenate((table_VE, missing))
    table = ir.tensor(whole_VE, name="embeddings")
    ids = _value("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    width = table_VE.shape[1]
    embeds = _value("inputs_embeds", ir.DataType.FLOAT, ["batch_size", "sequence_length", width])
    weight = ir.Value(
        name="embeddings",
        const_value=table,
        type=ir.TensorType(table.dtype),
        shape=ir.Shape(whole_VE.shape),
    )
    gather = ir.Node("", "Gather", [weight, ids], outputs=[embeds], name="embed")
    graph = ir.Graph(
        [ids], [embeds], nodes=[gather], initializers=[weight],
        name=EMBEDDINGS, opset_imports={"": OPSET},
    )  # fmt: skip
    return ir.Model(graph, ir_version=10, producer_name="llavakit")


def trace_decoder(model: LlavaModel, attention: Attention) -> ir.Model:
    """Return the graph from embeddings, mask, positions and cache to logits and cache.

    Raises ModelError for a language model that is not one of transformers, or has no ONNX form.
    """
    layers, heads, width = model.language.cache_shape()
    # sizes of the example: all different, and none 0 or 1, which torch.export takes for constants
    batch, rows, past = 2, 3, 5
    shape = (batch, heads, past, width)
    inputs = (
        torch.zeros(batch, rows, model.language.width),
        torch.ones(batch, past + rows, dtype=torch.int64),
        torch.arange(past, past + rows).expand(batch, -1),
        tuple((torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)),
        torch.tensor(0),
    )
    names = ("batch_size", "sequence_length", "past_sequence_length")
    b, t, p = (torch.export.Dim(name, max=1 << 20) for name in names)
    whole = torch.export.Dim.DYNAMIC
    held = tuple(({0: b, 2: p}, {0: b, 2: p}) for _ in range(layers))
    decoder = _Decoder(model, attention).eval()
    try:
        with own_forward(decoder.causal):
            graph = _trace(
                decoder,
                inputs,
                ({0: b, 1: t}, {0: b, 1: whole}, {0: b, 1: t}, held, {}),
                ["inputs_embeds", "attention_mask", "position_ids", *cache_names(layers), KEEP],
                ["logits", *cache_names(layers, "present")],
            )
    except ModelError as error:
        raise ModelError(f"language model `{model.language.name}` {error}") from error
    values = {value.name: value for value in (*graph.graph.inputs, *graph.graph.outputs)}
    first, past_name, total = names[:2], names[2], "total_sequence_length"
    _shape(values["inputs_embeds"], [*first, model.language.width])
    _shape(values["attention_mask"], [names[0], total])
    _shape(values["position_ids"], list(first))
    _shape(values["logits"], [names[0], "logits_length", model.language.head.weight.shape[0]])
    for name in cache_names(layers):
        _shape(values[name], [names[0], heads, past_name, width])
    for name in cache_names(layers, "present"):
        _shape(values[name], [names[0], heads, total, width])
    keep = values[KEEP]
    keep.const_value = ir.tensor(np.asarray(0, np.int64), name=KEEP)
    cut_early(graph.graph)
    graph.graph.register_initializer(keep)  # an input with a default: clients need not give it
    return graph


def _causal(model: LlavaModel) -> Any:
    from transformers import PreTrainedModel

    causal = getattr(model.language, "model", None)
    if not isinstance(causal, PreTrainedModel):
        raise ModelError(
            f"language model `{model.language.name}` is not one of transformers' (its `model` is "
            f"{type(causal).__name__}, not a PreTrainedModel), and only those can become ONNX"
        )
    return causal


def _trace(
    module: nn.Module,
    inputs: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ir.Model:
    """Return the graph of a module. Raises ModelError if an operator has no ONNX form."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch warns of two names for axes of equal size
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic,
                input_names=list(input_names),
                output_names=list(output_names),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(_reason(error)) from error
    assert program is not None
    graph = program.model
    graph.producer_name, graph.producer_version = "llavakit", ""
    ClearMetadataAndDocStringPass()(graph)  # traces of the source, with this machine's paths
    return graph


_OPERATOR = re.compile(r"OpOverload\(op='([^']+)'")


def _reason(error: BaseException) -> str:
    """Return the reason as the end of a sentence that begins with the component's name."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModelError):
            return str(cause)
        found = _OPERATOR.search(str(cause))
        if found is not None:
            return (
                f"uses the operator `{found[1]}`, which has no ONNX form; write that part with "
                "torch's own operators, or register a translation with torch.onnx"
            )
        last, cause = cause, cause.__cause__ or cause.__context__
    line = str(last).strip().partition("\n")[0]
    return f"cannot be traced for ONNX: {line}; write its `forward` so that torch.export takes it"


def _value(name: str, kind: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))


def _shape(value: ir.Value, shape: Sequence[int | str]) -> None:
    value.shape = ir.Shape(shape)


Graphs = Mapping[str, Callable[[], ir.Model]]


def graphs(model: LlavaModel, attention: Attention, rows: int) -> Graphs:
    """Return a function for each graph that traces it, by the name of its file.

    Functions, so that only one graph at a time is in memory.
    """
    connector: Graphs = {CONNECTOR: lambda: trace_connector(model)}
    return {
        VISION: lambda: trace_vision(model),
        **(connector if pools_features(model) else {}),
        EMBEDDINGS: lambda: embed_graph(model, rows),
        DECODER: lambda: trace_decoder(model, attention),
    }


def pools_features(model: LlavaModel) -> bool:
    """Say whether features of videos are pooled between encoder and connector."""
    return model.tiling is not None and model.tiling.pools
