"""Converts a graph to a smaller precision: fp16, dynamic int8, or 8 or 4 bits in blocks
(MatMulNBits)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from llavakit_plugins.onnx.runtime.layout import CONNECTOR, DECODER, EMBEDDINGS, VISION, Precision

_BLOCK = {8: 128, 4: 32}  # weights that share a scale, by bits
_SMALLEST_BLOCK = 16  # of MatMulNBits
_PADDING = 0.05
"""Share by which blocks may enlarge the weights: the rest of a column fills a whole block."""
_INT8 = 4  # MatMulNBits' `accuracy_level`: the type in which it computes


def convert(
    graph: str, model: onnx.ModelProto, precision: Precision, block: int | None
) -> onnx.ModelProto:
    """Return a graph in another precision. `model`, the fp32 graph, may be changed.

    Inputs and outputs stay float32, except the key-value cache of fp16, which is float16. `block`
    is the number of weights that share a scale; by default 128 for 8 bits and 32 for 4 bits, fewer
    in narrow models.
    """
    if precision == "fp32":
        return model
    if precision == "fp16":
        return _half(graph, model)
    if graph == EMBEDDINGS:  # a look-up has no products to quantise; fp16 halves its size
        return _half(graph, model)
    if precision == "int8":
        return _dynamic(model)
    eight = precision == "q8" or graph in (VISION, CONNECTOR)
    return _blocks(model, 8 if eight else 4, block)


def _half(graph: str, model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    kept = [name for name in names if not name.startswith(("past_key_values", "present"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of weights beyond float16's range, and clamps
        half: onnx.ModelProto = convert_float_to_float16(
            model,
            keep_io_types=kept if graph == DECODER else True,
            disable_shape_infer=True,
        )
    return half


def _dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    with _quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

    return _through_files(
        model,
        lambda source, target: quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            # a scale for each column: with one for the whole matrix,
            # a few large weights cost all others bits
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        ),
    )


def _blocks(model: onnx.ModelProto, bits: int, block: int | None) -> onnx.ModelProto:
    """Return the graph with weights quantised in blocks.

    Products are computed in int8, the rows with a scale for each block as well, so that one large
    activation costs only its own block bits: the fastest way for one row at a time, and on CPUs
    with VNNI for many. Those without it would read images faster from weights unpacked to float32.
    """
    with _quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            MatMulNBitsQuantizer,
        )

        settings = DefaultWeightOnlyQuantConfig(
            block_size=block or _fitting(model, _BLOCK[bits]),
            # 4 bits have 16 levels: a zero point of its own for each block uses all of them
            is_symmetric=bits == 8,
            accuracy_level=_INT8,
            bits=bits,
        )
        quantizer = MatMulNBitsQuantizer(model, algo_config=settings)
        quantizer.process()
    found: onnx.ModelProto = quantizer.model.model
    return found


def _fitting(model: onnx.ModelProto, block: int) -> int:
    """Return `block`, or the largest smaller power of two that pads the weights by 5 % at most."""
    tables = {table.name: table.dims for table in model.graph.initializer if len(table.dims) == 2}
    weights = [
        tables[node.input[1]]
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in tables
    ]
    most = (1 + _PADDING) * sum(rows * columns for rows, columns in weights)
    while block > _SMALLEST_BLOCK:
        if sum(-(-rows // block) * block * columns for rows, columns in weights) <= most:
            break
        block //= 2
    return block


def _through_files(model: onnx.ModelProto, change: Callable[[Path, Path], None]) -> onnx.ModelProto:
    """Run a converter that works on files. Graphs over 2 GB do not fit into one protobuf."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name, _quiet():
        source, target = Path(name) / "source.onnx", Path(name) / "target.onnx"
        onnx.save_model(model, source, save_as_external_data=True, location="source.onnx_data")
        change(source, target)
        return onnx.load(target)


class _quiet:
    """Keeps onnxruntime's converters from logging every node.

    One of them configures the logging of the whole process when it is imported; that is undone.
    """

    def __enter__(self) -> None:
        root = logging.root
        self._before = root.manager.disable, root.level, list(root.handlers)
        logging.disable(logging.WARNING)

    def __exit__(self, *_: Any) -> None:
        disabled, level, handlers = self._before
        logging.disable(disabled)
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers
