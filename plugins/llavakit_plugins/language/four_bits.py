"""Works around the limits of bitsandbytes' 4-bit layers on a CPU.

On a CPU with AVX512-BF16, bitsandbytes packs a layer's weights into another format when the layer
first computes without gradients. It then computes many times faster, in bfloat16. The packed format
has limits: it takes whole blocks only (other sizes end in an AssertionError), it rounds the scales,
it gives no gradients, and all other code reads it as wrong numbers. So here a layer is packed only
if bfloat16 was requested and its sizes allow it, and it is unpacked, bit for bit as it was, before
anything else uses it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llavakit import ModelError

_INPUTS = 64  # weights that share a scale, as bitsandbytes divides them
_BLOCK = 32  # number of outputs that are packed together
_PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' attribute that says whether a layer packs
_log = logging.getLogger("llavakit")


def prepare(model: Any, source: object, dtype: torch.dtype) -> None:
    """Make each 4-bit layer that lies on the CPU compute correctly there.

    `source` is named in errors and warnings; `dtype` is the type that was requested. Raises
    ModelError for a layer with a number of inputs that a CPU cannot compute.
    """
    slow = []
    for name, layer in _layers(model):
        if layer.weight.device.type != "cpu":
            setattr(layer, _PACKS, False)  # in case it is moved to the CPU later
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


def refuse_widths(model: Any, source: object) -> None:
    """Refuse, before any weights are read, what `prepare` would refuse of them on a CPU.

    Raises ModelError as `prepare` does.
    """
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            _refuse_part(source, name, layer, _INPUTS)


def _refuse_part(source: object, name: str, layer: Any, block: int) -> None:
    if layer.in_features % block:  # bitsandbytes reads blocks that cross rows wrongly
        raise ModelError(
            f"{source}: `{name}` has {layer.in_features} inputs, and in 4 bits a CPU computes "
            f'whole blocks of {block} only; leave `quantize = "nf4"` out, or use CUDA'
        )


def unpack(model: Any) -> None:
    """Unpack all 4-bit layers into bitsandbytes' usual format, which all other code can read."""
    for _, layer in _layers(model):
        _unpack(layer)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def _before_computing(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    # bitsandbytes packs at the first forward without gradients: keep the exact scales before that
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
    # packing rounded the scales; put the exact ones back
    state.absmax, state.offset, state.state2, state.nested = layer.scales
    layer.weight.data, layer.weight.quant_state = weight, state
