"""A projector as linear layers with exact GELU between them: what every layout of LLaVA holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llavakit import Connector, ModelError, Registry, Use
from llavakit_plugins.checkpoints.precision import State, precision


class Layer(NamedTuple):
    """One linear layer of a projector: weight `[out, in]`, bias `[out]`."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, state: State, key: str, name: str, where: object, *, bias: bool = True) -> Layer:
        """Return the layer whose tensors begin with `key`; without a `bias` it is zero.

        The checkpoint calls it `name`. Raises ModelError for tensors that are missing, left over
        or of no layer's shape.
        """
        parts = {what: state.get(f"{key}{what}") for what in ("weight", "bias")}
        for what, tensor in parts.items():
            if tensor is None and (bias or what == "weight"):
                raise ModelError(f"{where} lacks {name}{what}; copy the whole checkpoint")
        if not bias and parts["bias"] is not None:
            raise ModelError(
                f"{where} holds {name}bias, which by its config.json it has not; is it the "
                "config.json of these weights?"
            )
        weight = parts["weight"]
        assert weight is not None
        found = parts["bias"]
        made = cls(weight, weight.new_zeros(weight.shape[:1]) if found is None else found)
        if weight.dim() != 2 or made.bias.shape != weight.shape[:1]:
            raise ModelError(
                f"{where}: {name}weight is {list(weight.shape)} and its bias "
                f"{list(made.bias.shape)}, which no layer has; copy the checkpoint again"
            )
        return made


def make_connector(
    layers: Sequence[Layer],
    vision_width: int,
    language_width: int,
    registry: Registry,
    where: object,
) -> tuple[Use[Connector], Connector]:
    """Return the connector of these layers; raises ModelError where their shapes do not fit."""
    use: Use[Connector]
    if not layers:
        use = Use[Connector](use="identity")
    elif len(layers) == 1:
        use = Use[Connector](use="linear")
    else:
        use = Use[Connector].model_validate({"use": "mlp", "depth": len(layers)})
    with torch.device("meta"):
        connector = registry.build(use, vision_width=vision_width, language_width=language_width)
    tensors = {
        f"{number}.{t}": tensor
        for number, layer in enumerate(layers)
        for t, tensor in zip(layer._fields, layer, strict=True)
    }
    dtype = precision(tensors, "projector", where) if tensors else None
    for number, (module, layer) in enumerate(zip(linears(connector), layers, strict=True), start=1):
        if layer.weight.shape != module.weight.shape:
            raise ModelError(
                f"{where}: layer {number} of the projector is {list(layer.weight.shape)}, but "
                f"between this vision tower and language model it is {list(module.weight.shape)}; "
                "is it the projector of another model?"
            )
        module.weight, module.bias = (nn.Parameter(tensor.to(dtype)) for tensor in layer)
    return use, connector


def linears(module: nn.Module) -> list[nn.Linear]:
    """Return the linear layers within a module, in order."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def projector_layers(connector: Connector) -> list[Layer] | None:
    """Return a connector as linear layers with GELU between; None for one that is not so."""
    if connector.name == "identity":
        return []
    if connector.name not in ("linear", "mlp"):
        return None
    return [Layer(layer.weight.detach(), layer.bias.detach()) for layer in linears(connector)]
