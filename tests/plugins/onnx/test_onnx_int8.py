"""Products of 8-bit numbers: on which CPUs they are exact, and what is written of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnx
import onnxruntime

from llavakit_plugins.onnx.exporter.precision import convert
from llavakit_plugins.onnx.runtime.layout import DECODER
from llavakit_plugins.onnx.runtime.saturation import PRODUCT, saturates


def test_saturation_is_found() -> None:
    """By one product of the largest numbers, which a CPU without VNNI cuts off."""
    (node,) = onnx.load_from_string(PRODUCT).graph.node
    assert (node.op_type, list(node.input)) == ("MatMulInteger", ["a", "b"])

    class Cpu:
        """A runtime that adds pairs of products up in `kind`."""

        SessionOptions = onnxruntime.SessionOptions

        def __init__(self, kind: type[np.signedinteger[Any]]) -> None:
            self.limits = np.iinfo(kind)

        def InferenceSession(self, *_: Any, **__: Any) -> Any:
            return self

        def run(self, _: None, given: dict[str, Any]) -> Any:
            a, b = (given[name].astype(np.int64) for name in "ab")
            pairs = [a[:, n : n + 2] @ b[n : n + 2] for n in range(0, len(b), 2)]
            return [sum(pair.clip(self.limits.min, self.limits.max) for pair in pairs)]

    assert saturates(Cpu(np.int16))
    assert not saturates(Cpu(np.int32))


def test_symmetric_weights_have_no_table_of_zeros() -> None:
    draw = np.random.default_rng(0)
    x_TK, weights_KN = (draw.normal(size=size).astype(np.float32) for size in ((5, 64), (64, 48)))
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "product",
        [onnx.helper.make_tensor_value_info("x", kind, ["rows", 64])],
        [onnx.helper.make_tensor_value_info("y", kind, ["rows", 48])],
        [onnx.numpy_helper.from_array(weights_KN, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    small = convert(
        DECODER, onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), "int8", None
    )
    (product,) = (node for node in small.graph.node if node.op_type == "MatMulInteger")
    assert len(product.input) == 3
    assert {table.name for table in small.graph.initializer} <= {
        name for node in small.graph.node for name in node.input
    }
    options = onnxruntime.SessionOptions()
    if saturates(onnxruntime):  # as our own runtime does on such a CPU
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(
        small.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x_TK})
    wanted = x_TK @ weights_KN
    assert np.abs(found - wanted).max() <= 0.05 * wanted.std()
