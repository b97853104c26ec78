"""Converts a graph to a smaller precision: fp16, dynamic int8, or 8 or 4 bits in blocks
(MatMulNBits)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from llavakit_plugins.onnx.exporter.fusion import MICROSOFT
from llavakit_plugins.onnx.runtime.layout import CONNECTOR, DECODER, EMBEDDINGS, VISION, Precision

_BLOCK = 128  # weights that share a scale
_SMALLEST_BLOCK = 16  # of MatMulNBits
_PADDING = 0.05
"""Share by which blocks may enlarge the weights: the rest of a column fills a whole block."""
_ROUNDING = 2**-10
"""Largest share of itself by which a scale may change: float16's rounding, and no denormals."""
FloatArray = npt.NDArray[np.float32]
_INT8 = 4  # MatMulNBits' `accuracy_level`: the type in which it computes


def convert(
    graph: str, model: onnx.ModelProto, precision: Precision, block: int | None
) -> onnx.ModelProto:
    """Return a graph in another precision. `model`, the fp32 graph, may be changed.

    Inputs and outputs stay float32, except the key-value cache of fp16, which is float16. `block`
    is the number of weights that share a scale; by default 128, fewer
    in narrow models.
    """
    if precision == "fp32":
        return model
    if precision == "fp16":
        return _half(graph, model)
    if graph == EMBEDDINGS:  # a look-up has no products to quantise; fp16 halves its size
        return _embeddings(model) if precision == "q4" else _half(graph, model)
    if precision == "int8":
        return _dynamic(model)
    eight = precision == "q8" or graph in (VISION, CONNECTOR)
    found = _blocks(model, 8 if eight else 4, block)
    return found if eight else _halve_scales(found)


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

    found = _through_files(
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
    # weights are symmetric: a zero for each column, as the converter writes it, would be read and
    # multiplied for nothing
    tables = {table.name: table for table in found.graph.initializer}
    products = [node for node in found.graph.node if node.op_type == "MatMulInteger"]
    for name in {node.input.pop() for node in products if len(node.input) == 4}:
        assert not onnx.numpy_helper.to_array(tables[name]).any()
        found.graph.initializer.remove(tables[name])
    return found


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
            block_size=block or _fitting(model, _BLOCK),
            # 4 bits have 16 levels: a zero point of its own for each block uses all of them
            is_symmetric=bits == 8,
            accuracy_level=_INT8,
            bits=bits,
        )
        quantizer = MatMulNBitsQuantizer(model, algo_config=settings)
        quantizer.process()
    found: onnx.ModelProto = quantizer.model.model
    return found


def _halve_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Keep the scales of 4-bit blocks in float16, a tenth of the file; a Cast widens each table.

    onnxruntime computes casts of constants once, as it loads a graph: nothing runs slower. Scales
    beyond float16's range, of weights that are all but 0, stay as they are.
    """
    graph = model.graph
    tables = {table.name: table for table in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "MatMulNBits"]:
        scales = tables[node.input[2]]
        exact = onnx.numpy_helper.to_array(scales)
        half = exact.astype(np.float16)
        if not _same_within(half.astype(np.float32), exact, _ROUNDING):
            continue
        name = f"{scales.name}.half"
        scales.CopyFrom(onnx.numpy_helper.from_array(half, name))
        cast = onnx.helper.make_node("Cast", [name], [node.input[2]], to=onnx.TensorProto.FLOAT)
        cast.name = f"{name}.cast"
        graph.node.insert(0, cast)
    return model


def _same_within(found: FloatArray, exact: FloatArray, share: float) -> bool:
    return bool((np.abs(found - exact) <= share * np.abs(exact)).all())


def _embeddings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the look-up with a table of 8 bits in blocks, whose scales are float16.

    A table whose width is no multiple of the smallest block stays in float16.
    """
    graph = model.graph
    (table,), (gather,) = graph.initializer, graph.node
    table_VE = onnx.numpy_helper.to_array(table)
    rows, width = table_VE.shape
    block = next((b for b in (128, 64, 32, _SMALLEST_BLOCK) if width % b == 0), None)
    if block is None:
        return _half(EMBEDDINGS, model)
    blocks_VNB = table_VE.reshape(rows, -1, block)
    # rounded to float16 first, so that the levels are those of the scale that is kept
    scales_VN = (np.abs(blocks_VNB).max(-1) / 127).astype(np.float16).astype(np.float32)
    divisors_VN1 = np.where(scales_VN, scales_VN, 1)[..., None]
    levels_VNB = np.rint(blocks_VNB / divisors_VN1).clip(-127, 127) + 128
    packed = {
        f"{table.name}.levels": levels_VNB.reshape(rows, width).astype(np.uint8),
        f"{table.name}.half_scales": scales_VN.astype(np.float16),
    }
    name = f"{table.name}.scales"
    nodes = [
        onnx.helper.make_node(
            "Cast", [f"{table.name}.half_scales"], [name], f"{name}.cast",
            to=onnx.TensorProto.FLOAT,
        ),
        onnx.helper.make_node(
            "GatherBlockQuantized", [f"{table.name}.levels", gather.input[1], name],
            gather.output, gather.name, domain=MICROSOFT,
            bits=8, block_size=block, gather_axis=0, quantize_axis=1,
        ),
    ]  # fmt: skip
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in packed.items())
    graph.node.extend(nodes)
    model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    return model


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
