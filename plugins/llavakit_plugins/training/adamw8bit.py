"""AdamW with a state of 8 bits, by bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llavakit_plugins.training.adamw import AdamW, AdamWOptions, fused_adamw
from llavakit_plugins.training.kinds import Group, Stateful

_BLOCK = 256  # elements that share a scale, in bitsandbytes
_LARGE = 4096  # elements of a weight from which bytes are worth it, as in bitsandbytes


class AdamW8bit(AdamW):
    """AdamW whose moments take a byte each (arXiv 2110.02861), by bitsandbytes.

    Small weights, such as norms and biases, have whole ones.
    """

    name = "adamw8bit"
    state_bytes = 2.0

    @classmethod
    def missing(cls, options: AdamWOptions) -> str | None:
        if find_spec("bitsandbytes") is not None:
            return None
        return (
            "the optimiser `adamw8bit` needs bitsandbytes, which is not installed; "
            "`pip install 'llavakit[lora]'`, or take `adamw`"
        )

    def optimizers(self, groups: Sequence[Group]) -> Sequence[torch.optim.Optimizer]:
        sizes: dict[bool, list[Group]] = {True: [], False: []}
        for group in groups:
            for large, found in sizes.items():
                named = {n: p for n, p in group.named.items() if (p.numel() >= _LARGE) == large}
                if named:
                    found.append(Group(named, group.peak, group.weight_decay))
        many: list[torch.optim.Optimizer] = []
        if sizes[True]:
            many.append(_EightBits(sizes[True], self.options))
        if sizes[False]:
            many.append(fused_adamw(sizes[False], self.options))
        return many


class _EightBits(torch.optim.Optimizer, Stateful):
    """Hands bitsandbytes' AdamW8bit what lies on this device: it knows of no divided weights."""

    def __init__(self, groups: Sequence[Group], options: AdamWOptions) -> None:
        import bitsandbytes

        tables: list[dict[str, Any]] = [
            {"params": [*group.named.values()], "lr": group.peak, "decay": group.weight_decay}
            for group in groups
        ]
        super().__init__(tables, {})
        self._own: dict[nn.Parameter, nn.Parameter] = {}
        self._steps = dict[nn.Parameter, int]()
        inner: list[dict[str, Any]] = []
        for table in self.param_groups:
            for parameter in table["params"]:
                # the same memory: an update of the one is an update of the other
                self._own[parameter] = nn.Parameter(_local(parameter.detach()))
            params = [self._own[parameter] for parameter in table["params"]]
            inner.append({"params": params, "lr": table["lr"], "weight_decay": table["decay"]})
        library: Any = bitsandbytes.optim
        self._inner: Any = library.AdamW8bit(
            inner, betas=options.betas, eps=options.eps, min_8bit_size=0
        )
        self._at = {
            own: (group, gindex, pindex)
            for gindex, group in enumerate(self._inner.param_groups)
            for pindex, own in enumerate(group["params"])
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for table, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["lr"] = table["lr"]
        for parameter, own in self._own.items():
            if parameter.grad is None:
                continue
            self._steps[parameter] = self._steps.get(parameter, 0) + 1
            own.data = _local(parameter.detach())
            # of a weight with few rows a device may hold none
            own.grad = _local(parameter.grad) if own.numel() else None
        self._inner.step()
        for own in self._own.values():
            own.grad = None

    def saved(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """Return bytes as they are, and the scale of each, which is that of its block: so another
        number of devices, with other blocks, can read them."""
        if parameter not in self._steps:
            return {}
        own = self._own[parameter]
        state = self._inner.state.get(own, {})
        found = {"step": torch.tensor(float(self._steps[parameter]))}
        for moment in "12":
            codes = torch.zeros_like(own, dtype=torch.uint8, requires_grad=False)
            scales = torch.zeros_like(own, requires_grad=False)
            if state:
                codes = state[f"state{moment}"]
                each = state[f"absmax{moment}"].repeat_interleave(_BLOCK)[: own.numel()]
                scales = each.reshape(own.shape)
            found |= {f"codes{moment}": _like(parameter, codes)}
            found |= {f"scales{moment}": _like(parameter, scales)}
        return found

    def restore(self, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        from bitsandbytes.functional import quantize_blockwise

        own = self._own[parameter]
        own.data = _local(parameter.detach())
        if not tensors:
            return
        self._steps[parameter] = steps = int(tensors["step"])
        if not own.numel():
            return
        self._inner.init_state(*((at := self._at[own])[0], own, *at[1:]))
        state = self._inner.state[own]
        state["step"] = steps
        for moment in "12":
            codes, scales = (_local(tensors[f"{what}{moment}"]) for what in ("codes", "scales"))
            each = scales.flatten()[::_BLOCK].contiguous()
            whole = each.repeat_interleave(_BLOCK)[: own.numel()].reshape(own.shape)
            if not torch.equal(whole, scales):  # blocks of another number of devices
                code = state[f"qmap{moment}"]
                values = code[codes.long()] * scales
                codes, found = quantize_blockwise(values, code=code, blocksize=_BLOCK)
                each = found.absmax
            state[f"state{moment}"].copy_(codes)
            state[f"absmax{moment}"].copy_(each)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: nn.Parameter, own: Tensor) -> Tensor:
    """Return what this device holds, as a part of a tensor that is divided as the parameter is."""
    if not isinstance(parameter, DTensor):
        return own
    return DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
