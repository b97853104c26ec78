"""Muon for matrices that are divided over devices: each is made orthogonal whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from llavakit_plugins.training.muon_stacked import StackedMuon, orthogonal


class DividedMuon(StackedMuon):
    """The same update as StackedMuon's, of weights that are divided.

    One matrix after the other is gathered on all devices, each of which makes it orthogonal, in
    `dtype`, and keeps its share. torch.optim.Muon exchanges messages for each of its products
    there, and cannot update a matrix with fewer rows than devices.
    """

    def __init__(self, tables: Sequence[dict[str, Any]], *, dtype: torch.dtype, **how: Any) -> None:
        super().__init__(tables, **how)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. All devices must call it."""
        for table in self.param_groups:
            for parameter in table["params"]:
                if parameter.grad is not None:
                    update = self._orthogonal(parameter, parameter.grad)
                    scale = 0.2 * math.sqrt(max(parameter.shape))
                    parameter.mul_(1 - table["lr"] * table["weight_decay"])
                    parameter.add_(update, alpha=-table["lr"] * scale)

    def _orthogonal(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        mean = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        mean.lerp_(gradient, 1 - self._momentum)
        update = gradient.lerp(mean, self._momentum) if self._nesterov else mean
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        found = orthogonal(whole[None], self._iterations, self._dtype)[0].to(parameter.dtype)
        if not isinstance(parameter, DTensor):
            return found
        # all have the whole of it: nothing is sent
        return distribute_tensor(
            found, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
