"""Layers of 4 bits by bitsandbytes on a CPU.

On a CPU with AVX512-BF16 bitsandbytes packs the weights of a layer anew when it first computes
without gradients, and computes many times faster then, in bfloat16. But it takes whole blocks only
(others end in an AssertionError), rounds the scales, gives no gradient from then on, and what is
packed is read as other numbers by everything else. So here a layer is packed where bfloat16 was
asked for and its widths allow it, and unpacked, to the bit as it was, before anything else is done
with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llavakit import ModelError

_INPUTS = 64  # weights that share a scale, as bitsandbytes divides them
_BLOCK = 32  # outputs that are packed together
_PACKS = "support_avx512bf16_for_cpu"  # a layer's own word for whether it packs
_log = logging.getLogger("llavakit")


def prepare(model: Any, source: object, dtype: torch.dtype) -> None:
    """Make each layer of 4 bits compute right on this CPU, where it is one that lies there.

    Raises ModelError, which begins with `source`, for a width that it cannot compute.
    """
    slow = []
    for name, layer in _layers(model):
        if layer.weight.device.type != "cpu":
            setattr(layer, _PACKS, False)  # should it come here later
            continue
        block = layer.weight.quant_state.blocksize
        _refuse_part(source, name, layer, block)
        fast = getattr(layer, _PACKS, False) and dtype == torch.bfloat16
        whole = layer.out_features % _BLOCK == 0
        if fast and not whole:
            slow.append(f"`{name}` has {layer.out_features}")
        setattr(layer, _PACKS, fast and whole)
        if fast and whole:
            layer.register_forward_pre_hook(_before_computing)
            layer.register_state_dict_pre_hook(_before_saving)
    if slow:
        _log.warning(
            "%s: %d layers of 4 bits are computed slowly: the fast way of this CPU takes outputs "
            "in multiples of %d, and %s",
            source, len(slow), _BLOCK, slow[0],
        )  # fmt: skip


def refuse_widths(model: Any, source: object, device: str) -> None:
    """Refuse, before any weights are read, what `prepare` would refuse of them.

    Raises ModelError as `prepare` does.
    """
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if device == "cpu" and isinstance(layer, torch.nn.Linear) and layer is not head:
            _refuse_part(source, name, layer, _INPUTS)


def _refuse_part(source: object, name: str, layer: Any, block: int) -> None:
    if layer.in_features % block:  # bitsandbytes reads blocks that cross rows wrongly
        raise ModelError(
            f"{source}: `{name}` has {layer.in_features} inputs, and in 4 bits a CPU computes "
            f'whole blocks of {block} only; leave `quantize = "nf4"` out, or use CUDA'
        )


def unpack(model: Any) -> None:
    """Bring all layers of 4 bits back into the form in which others read them."""
    for _, layer in _layers(model):
        _unpack(layer)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def _before_computing(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    if layer.training or inputs[0].requires_grad:
        _unpack(layer)
    elif not _is_packed(layer):
        state = layer.weight.quant_state
        layer.scales = (state.absmax, state.offset, state.state2, state.nested)


def _before_saving(layer: Any, prefix: str, keep_vars: bool) -> None:
    _unpack(layer)


def _is_packed(layer: Any) -> bool:
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def _unpack(layer: Any) -> None:
    if not _is_packed(layer):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight, state = _convert_weight_packed_for_cpu_inverse(
        layer.weight.data, layer.weight.quant_state
    )
    state.absmax, state.offset, state.state2, state.nested = layer.scales  # it rounds them
    layer.weight.data, layer.weight.quant_state = weight, state
