"""Removes the work of the last layer for rows of a prompt whose logits are not needed.

A decoder takes its last rows just before the head. Everything between the last attention and that
cut works on each row separately, so the cut can be moved to right behind the attention. Output
projection, MLP and norm of the last layer then compute the kept rows only.
"""

from __future__ import annotations

import onnx_ir as ir

from llavakit_plugins.onnx.runtime.layout import KEEP

# operators that work on each number separately
_EACH_NUMBER = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Abs", "Sqrt", "Reciprocal", "Cast", "Sigmoid",
     "Tanh", "Relu", "Gelu", "Erf")
)  # fmt: skip
# operators that work on each row separately if their axis is the last
_LAST_AXIS = frozenset(("RMSNormalization", "LayerNormalization", "Split"))


def cut_early(graph: ir.Graph) -> None:
    """Move the cut of a decoder's last rows to right behind the last attention, in place."""
    cut = _cut(graph)
    source = cut.inputs[0]
    assert source is not None
    # from the end: a node moves behind the cut if all its users have moved and it works by rows
    moved = {cut}
    for node in reversed(graph):
        users = {user for output in node.outputs for user, _ in output.uses()}
        if users and users <= moved and _by_row(node, source):
            moved.add(node)
    moved.remove(cut)
    if not moved:
        return
    into = [
        (node, index, value)
        for node in (node for node in graph if node in moved)
        for index, value in enumerate(node.inputs)
        if value is not None and value.producer() not in moved and _has_rows(value, source)
    ]
    for value in dict.fromkeys(value for _, _, value in into):
        early = ir.Node("", "Slice", [value, *cut.inputs[1:]], name=f"{cut.name}.{value.name}")
        kept = early.outputs[0]
        kept.name, kept.type = f"{value.name}.kept", value.type
        graph.append(early)
        for node, index, old in into:
            if old is value:
                node.replace_input_with(index, kept)
    for node in moved:
        for output in node.outputs:
            output.shape = None  # the traced shape has the number of rows before the cut
    cut.outputs[0].replace_all_uses_with(source)
    graph.remove(cut, safe=True)
    graph.sort()


def _cut(graph: ir.Graph) -> ir.Node:
    """Return the node that takes the last rows."""
    value = next(value for value in graph.inputs if value.name == KEEP)
    while True:
        ((node, _),) = value.uses()
        if node.op_type == "Slice":
            return node
        (value,) = node.outputs


def _by_row(node: ir.Node, like: ir.Value) -> bool:
    """Return whether each row of a node's outputs depends on the same row of its inputs only."""
    if node.domain or not all(_has_rows(value, like) for value in node.outputs):
        return False
    taken = [value for value in node.inputs if value is not None]
    if node.op_type == "MatMul":
        return _has_rows(taken[0], like) and _rank(taken[1]) == 2
    if not all(_has_rows(value, like) or _for_every_row(value) for value in taken):
        return False
    if node.op_type in _LAST_AXIS:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else None
        return axis in (-1, _rank(like) - 1)
    return node.op_type in _EACH_NUMBER


def _has_rows(value: ir.Value, like: ir.Value) -> bool:
    """Return whether a value has the shape `[B, T, *]` with the B and T of `like`."""
    shape, other = value.shape, like.shape
    if shape is None or other is None or len(shape) != len(other):
        return False
    return (shape[0], shape[1]) == (other[0], other[1])


def _for_every_row(value: ir.Value) -> bool:
    """Return whether a value is a constant number or vector, the same for every row."""
    return value.is_initializer() and _rank(value) <= 1


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)
