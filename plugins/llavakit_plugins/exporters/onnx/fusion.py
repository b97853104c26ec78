"""Rewrites a decoder's graph with onnxruntime's own operators, fewer and larger ones.

Per layer, projections of queries, keys and values become one product, as do those of the gated
MLP; the residual addition joins the norm behind it.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

_MICROSOFT = "com.microsoft"


def fuse(model: ir.Model) -> None:
    """Rewrite a decoder in place."""
    CommonSubexpressionEliminationPass()(model)
    merge_products(model.graph)
    join_residuals(model.graph)
    model.opset_imports[_MICROSOFT] = 1


def merge_products(graph: ir.Graph) -> None:
    """Turn products of one input with several weights into one product and a split."""
    by_input: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMul" and node.domain == "" and _weight(node) is not None:
            source = node.inputs[0]
            assert source is not None
            by_input[source].append(node)
    for source, nodes in by_input.items():
        weights = [_weight(node) for node in nodes]
        if len(nodes) < 2 or len({id(weight) for weight in weights}) < len(nodes):
            continue
        tables = [weight.const_value.numpy() for weight in weights if weight and weight.const_value]
        merged = np.concatenate(tables, axis=1)
        name = "+".join(weight.name or "" for weight in weights if weight)
        table = ir.Value(
            name=name,
            const_value=ir.tensor(merged, name=name),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(merged.shape),
        )
        sizes = np.asarray([weight.shape[1] for weight in tables], np.int64)
        split = ir.Value(
            name=f"{name}.sizes",
            const_value=ir.tensor(sizes, name=f"{name}.sizes"),
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape(sizes.shape),
        )
        graph.register_initializer(table)
        graph.register_initializer(split)
        product = ir.Node("", "MatMul", [source, table], name=f"{nodes[0].name}.merged")
        product.outputs[0].name = f"{name}.product"
        product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        parts = ir.Node(
            "", "Split", [product.outputs[0], split], [ir.AttrInt64("axis", -1)],
            num_outputs=len(nodes), name=f"{nodes[0].name}.split",
        )  # fmt: skip
        graph.insert_before(nodes[0], [product, parts])
        for node, part in zip(nodes, parts.outputs, strict=True):
            old = node.outputs[0]
            part.name, part.type, part.shape = old.name, old.type, old.shape
            old.replace_all_uses_with(part)
            graph.remove(node, safe=True)
        for weight in weights:
            if weight is not None and not weight.uses():
                graph.initializers.pop(weight.name or "")


def join_residuals(graph: ir.Graph) -> None:
    """Join an addition and the norm of its sum into SkipSimplifiedLayerNormalization."""
    for norm in list(graph):
        if norm.op_type != "RMSNormalization" or norm.domain != "":
            continue
        total, scale = norm.inputs[0], norm.inputs[1]
        addition = total.producer() if total is not None else None
        if total is None or addition is None or addition.op_type != "Add":
            continue
        left, right = addition.inputs
        if left is None or right is None or left.const_value or right.const_value:
            continue
        epsilon = norm.attributes["epsilon"].as_float()
        joined = ir.Node(
            _MICROSOFT, "SkipSimplifiedLayerNormalization", [left, right, scale],
            [ir.AttrFloat32("epsilon", epsilon)], num_outputs=4, name=f"{norm.name}.joined",
        )  # fmt: skip
        normed, _, _, added = joined.outputs
        for value in joined.outputs[1:3]:
            value.name = ""
        for new, old in ((normed, norm.outputs[0]), (added, total)):
            new.name, new.type, new.shape = old.name, old.type, old.shape
        graph.insert_before(norm, joined)
        norm.outputs[0].replace_all_uses_with(normed)
        graph.remove(norm, safe=True)
        total.replace_all_uses_with(added)
        graph.remove(addition, safe=True)


def _weight(node: ir.Node) -> ir.Value | None:
    weight = node.inputs[1]
    known = weight is not None and weight.const_value is not None and weight.is_initializer()
    return weight if known and weight.shape is not None and len(weight.shape) == 2 else None
