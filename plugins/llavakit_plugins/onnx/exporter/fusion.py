"""Rewrites a decoder's graph with onnxruntime's own operators, which are fewer and larger.

In each layer, the projections of queries, keys and values become one product, and so do the two of
the gated MLP; a residual addition and the norm behind it become one operator; rotary positions are
computed within the attention.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

MICROSOFT = "com.microsoft"


def fuse(model: ir.Model, longest: int) -> None:
    """Rewrite a decoder in place; `longest` is the longest sequence in tokens that it will read."""
    # first: equal cosines and sines become one value, by which rotations are recognised
    CommonSubexpressionEliminationPass()(model)
    merge_products(model.graph)
    join_residuals(model.graph)
    rotate_in_attention(model, longest)
    join_heads(model.graph)
    RemoveUnusedNodesPass()(model)
    model.opset_imports[MICROSOFT] = 1


def merge_products(graph: ir.Graph) -> None:
    """Merge products of one input with several weights into one product and a split.

    One wide product is faster than several narrow ones.
    """
    by_input: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMul" and node.domain == "" and _weight(node) is not None:
            source = node.inputs[0]
            assert source is not None
            by_input[source].append(node)
    for source, nodes in by_input.items():
        weights = [_weight(node) for node in nodes]
        # a weight that is used twice would be stored twice
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
    """Replace an addition and the RMSNorm of its sum by one SkipSimplifiedLayerNormalization.

    Its fourth output is the sum, which the next residual addition needs.
    """
    for norm in list(graph):
        if norm.op_type != "RMSNormalization" or norm.domain != "":
            continue
        total, scale = norm.inputs[0], norm.inputs[1]
        addition = total.producer() if total is not None else None
        if total is None or addition is None or addition.op_type != "Add":
            continue
        left, right = addition.inputs
        # an addition of a constant is a bias and no residual
        if left is None or right is None or left.const_value or right.const_value:
            continue
        epsilon = norm.attributes["epsilon"].as_float()
        joined = ir.Node(
            MICROSOFT, "SkipSimplifiedLayerNormalization", [left, right, scale],
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


def rotate_in_attention(model: ir.Model, longest: int) -> None:
    """Let GroupQueryAttention rotate queries and keys, with a table of all positions.

    If there is no norm and no bias between projection and rotation, the operator takes the merged
    product of all three projections, without the split.
    """
    tables: dict[tuple[str, str], tuple[ir.Value, ir.Value]] = {}
    for node in list(model.graph):
        if node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT:
            continue
        query, key = (_rotated(node.inputs[index]) for index in (0, 1))
        value = _flat(node.inputs[2])
        if query is None or key is None or value is None or query[1:] != key[1:]:
            continue
        heads = node.attributes["num_heads"].as_int()
        cos, sin = query[1], query[2]
        names = (cos.name or "", sin.name or "")
        if names not in tables:
            tables[names] = _tables(model, names, longest)
        if 2 * tables[names][0].shape[1] * heads != _last(node.outputs[0]):  # type: ignore[index]
            continue  # only a part of each head is rotated, which not every onnxruntime can do
        sources = [query[0], key[0], value]
        whole = _product(sources)
        taken = [whole, None, None] if whole is not None else sources
        inputs = [*taken, *node.inputs[3:7], *tables[names]]
        attributes = [*node.attributes.values(), ir.AttrInt64("do_rotary", 1)]
        turned = ir.Node(
            MICROSOFT, "GroupQueryAttention", inputs, attributes,
            num_outputs=3, name=f"{node.name}.rotary",
        )  # fmt: skip
        for new, old in zip(turned.outputs, node.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
        model.graph.insert_before(node, turned)
        for number, output in enumerate(model.graph.outputs):
            if output in node.outputs:
                model.graph.outputs[number] = turned.outputs[node.outputs.index(output)]
        for new, old in zip(turned.outputs, node.outputs, strict=True):
            old.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)


def join_heads(graph: ir.Graph) -> None:
    """Leave out the reshapes behind GroupQueryAttention to heads and back."""
    for node in graph:
        if node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT:
            continue
        attended = value = node.outputs[0]
        while (
            len(value.uses()) == 1 and (user := next(iter(value.uses())).node).op_type == "Reshape"
        ):
            value = user.outputs[0]
            if value.shape is not None and len(value.shape) == 3:
                if _last(value) == _last(attended):
                    value.replace_all_uses_with(attended)
                break


def _rotated(flat: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return the input, cosines and sines of the rotation that `flat` `[B, T, H * K]` comes from.

    None if it does not come from a rotation, or from one that the operator cannot do.
    """
    rotation = _before(flat, ("Reshape", "Transpose"))
    node = rotation.producer() if rotation is not None else None
    if node is None or node.op_type != "RotaryEmbedding" or len(node.inputs) != 3:
        return None
    numbers = [node.attributes[n].as_int() for n in ("interleaved", "rotary_embedding_dim")
               if n in node.attributes]  # fmt: skip
    source = _before(node.inputs[0], ("Transpose", "Reshape"))
    _, cos, sin = node.inputs
    if any(numbers) or source is None or cos is None or sin is None:
        return None
    return source, cos, sin


def _flat(value: ir.Value | None) -> ir.Value | None:
    """Return the value before it was reshaped to heads and back."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Reshape":
            break
        value = node.inputs[0]
    return value


def _before(value: ir.Value | None, operators: tuple[str, ...]) -> ir.Value | None:
    """Return the input of a chain of operators that ends with `value`; the last operator first.

    None if the chain is another one.
    """
    for operator in operators:
        node = value.producer() if value is not None else None
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
    return value


def _product(sources: list[ir.Value]) -> ir.Value | None:
    """Return the product whose split gives queries, keys and values in this order, or None."""
    node = sources[0].producer()
    if node is None or node.op_type != "Split" or list(node.outputs) != sources:
        return None
    return node.inputs[0]


def _last(value: ir.Value) -> int:
    size = value.shape[-1] if value.shape is not None else None
    return size if isinstance(size, int) else -1


def _tables(model: ir.Model, names: tuple[str, str], longest: int) -> tuple[ir.Value, ir.Value]:
    """Return cosines and sines `[longest, K / 2]` of all positions, computed by the graph itself.

    So every scaling of rotary positions that transformers knows is right without code for it here.
    """
    from onnxruntime import InferenceSession, SessionOptions

    part = ir.Model(model.graph.clone(), ir_version=model.ir_version)
    graph = part.graph
    made = {value.name: value for node in graph for value in node.outputs}
    graph.outputs[:] = [made[name] for name in names]
    for value in graph.outputs:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
    RemoveUnusedNodesPass()(part)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
    content = ir.to_proto(part).SerializeToString()
    settings = SessionOptions()
    settings.log_severity_level = 3  # it warns of initializers that this part does not use
    session = InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    # some graphs also read the batch size from another input: it gets one sequence without rows
    feeds = {value.name or "": _empty(value) for value in graph.inputs}
    feeds["position_ids"] = np.arange(longest, dtype=np.int64)[None]
    found = []
    for name, table in zip(names, session.run(list(names), feeds), strict=True):
        rows = table.reshape(longest, -1)
        value = ir.Value(
            name=f"{name}.table",
            const_value=ir.tensor(rows, name=f"{name}.table"),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(rows.shape),
        )
        model.graph.register_initializer(value)
        found.append(value)
    return found[0], found[1]


def _empty(value: ir.Value) -> np.ndarray[Any, Any]:
    """Return an input of the graph with one sequence and no rows."""
    assert value.shape is not None
    assert value.dtype is not None
    first, *others = value.shape
    sizes = [size if isinstance(size, int) else 0 for size in others]
    return np.zeros((first if isinstance(first, int) else 1, *sizes), value.dtype.numpy())


def _weight(node: ir.Node) -> ir.Value | None:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or not weight.is_initializer():
        return None
    return weight if weight.shape is not None and len(weight.shape) == 2 else None
