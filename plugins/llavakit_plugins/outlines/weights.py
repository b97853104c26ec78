"""The weights of a network as a plan sees them: names and shapes. Without torch.

An outline stands for a built-in network in plans, which count weights and never compute. It has the
network's options, its sizes and the shapes of all its weights, by arithmetic from its
configuration; `tests/plugins/outlines` holds each against the network itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from llavakit.contracts.component import Component


class NotPlain(Exception):
    """Arithmetic is not enough for a model: networks of PyTorch must say its shapes."""


class Dtype(NamedTuple):
    itemsize: int


class Weight(NamedTuple):
    """A parameter's shape, in the terms of torch's."""

    shape: tuple[int, ...]
    dtype: Dtype = Dtype(4)

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return True


class Outline(Component):
    """A network's shapes, with the attributes of the network that plans ask for.

    Raises NotPlain where its options or its configuration are beyond the arithmetic.
    """

    width: int
    weights: dict[str, Weight]  #: Shared ones once.

    def parameters(self) -> Iterator[Weight]:
        return iter(self.weights.values())

    def trainable(self) -> Iterator[tuple[str, Weight]]:
        return iter(self.weights.items())

    def frozen_bytes(self, each: int) -> float:
        return float(each * sum(weight.numel() for weight in self.parameters()))

    def with_options(self, options: Any) -> Self:
        raise NotPlain(f"`{self.name}` is changed")


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> dict[str, Weight]:
    """Return the weights of a linear layer."""
    found = {f"{name}.weight": Weight((outputs, inputs))}
    return found | {f"{name}.bias": Weight((outputs,))} if bias else found


def layer_norm(name: str, width: int) -> dict[str, Weight]:
    return {f"{name}.weight": Weight((width,)), f"{name}.bias": Weight((width,))}


_MOST = 1 << 24  # far beyond any model's; products of a few stay far below 64 bits
_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


def plain_config(
    table: Mapping[str, Any],
    counts: Mapping[str, int | None],
    others: Mapping[str, Any],
    types: Sequence[str],
) -> dict[str, Any]:
    """Return a configuration with its defaults, where transformers takes it as it is.

    `counts` and `others` are what it may state: whole numbers above 0, and those of a type. A key
    ending with `_token_id` is a row of the vocabulary. Raises NotPlain for anything else.
    """
    stated = dict(table)
    if stated.pop("model_type", types[0]) not in types:
        raise NotPlain("another `model_type`")
    found = {**counts, **others}
    for key, value in stated.items():
        if key not in found or not _is_plain(key, value, counts, others):
            raise NotPlain(f"`{key}` in its configuration")
        found[key] = value
    return found


def _is_plain(
    key: str, value: object, counts: Mapping[str, object], others: Mapping[str, object]
) -> bool:
    if key in counts:
        missing = value is None and counts[key] is None
        return missing or (type(value) is int and 0 < value <= _MOST)
    if key == "hidden_act":
        return value in _ACTIVATIONS
    if key.endswith("_token_id"):
        return type(value) is int
    if isinstance(value, float):
        return type(others[key]) is float and 0 <= value < math.inf
    return type(value) is type(others[key])
