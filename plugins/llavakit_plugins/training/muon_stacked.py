"""Muon whose matrices of one shape are made orthogonal together, in float32.

Shapes: N matrices of one shape, R rows, C columns; rows and columns are exchanged where R > C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.775, 2.0315
"""The polynomial of Muon's Newton-Schulz iteration (Keller Jordan, 2024)."""
_WIDE = 2  # times as many columns as rows: then a Gram matrix is less to iterate than the matrix


class StackedMuon(torch.optim.Optimizer):
    """torch.optim.Muon's update, scaled to the size of AdamW's, with few and large products.

    A network of many small matrices waits for the host, which starts 15 products for each of them;
    here they are started once for all matrices of a shape. float32 costs little then, and a CPU
    without products in bfloat16 is not slowed down.
    """

    def __init__(
        self,
        tables: Sequence[dict[str, Any]],
        *,
        momentum: float,
        nesterov: bool,
        iterations: int,
    ) -> None:
        super().__init__(tables, {"lr": 0.0, "weight_decay": 0.0})
        self._momentum, self._nesterov, self._iterations = momentum, nesterov, iterations

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for table in self.param_groups:
            learned: list[Tensor] = [p for p in table["params"] if p.grad is not None]
            for shape, same in groupby(sorted(learned, key=_shape), key=_shape):
                self._update(list(same), shape, table["lr"], table["weight_decay"])

    def _update(
        self, parameters: list[Tensor], shape: tuple[int, ...], lr: float, decay: float
    ) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        means = [
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters
        ]
        torch._foreach_lerp_(means, gradients, 1 - self._momentum)
        updates_NRC = torch.stack(means)
        if self._nesterov:
            updates_NRC = torch.stack(gradients).lerp_(updates_NRC, self._momentum)
        updates_NRC = orthogonal(updates_NRC, self._iterations)
        torch._foreach_mul_(parameters, 1 - lr * decay)
        scale = 0.2 * math.sqrt(max(shape))  # the root mean square of AdamW's updates
        torch._foreach_add_(parameters, updates_NRC.unbind(), alpha=-lr * scale)


def orthogonal(matrices_NRC: Tensor, iterations: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1, in `dtype`.

    Newton-Schulz iterations bring them to about 0.7 to 1.2 (arXiv 2502.16982, section 2.1).
    """
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x_NRC = matrices_NRC.to(dtype)
    x_NRC = x_NRC.mT.contiguous() if tall else x_NRC
    x_NRC = x_NRC / torch.linalg.matrix_norm(x_NRC, keepdim=True).clamp(min=1e-7)
    gram_NRR = x_NRC @ x_NRC.mT
    # powers of a Gram matrix need float32
    if dtype == torch.float32 and x_NRC.shape[2] >= _WIDE * x_NRC.shape[1]:
        x_NRC = _factor(gram_NRR, iterations) @ x_NRC
    else:
        for number in range(iterations):
            gram_NRR = x_NRC @ x_NRC.mT if number else gram_NRR
            above_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=_B, alpha=_C)
            x_NRC = torch.baddbmm(x_NRC, above_NRR, x_NRC, beta=_A)
    return x_NRC.mT if tall else x_NRC


def _factor(gram_NRR: Tensor, iterations: int) -> Tensor:
    """Return what all iterations multiply matrices with this Gram matrix by, `[N, R, R]`.

    Each multiplies by a polynomial of the Gram matrix, which so can be followed without the wide
    matrices themselves: all of these factors are symmetric, and commute.
    """
    factor_NRR = None
    for _ in range(iterations):
        one_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=_B, alpha=_C)
        one_NRR.diagonal(dim1=1, dim2=2).add_(_A)
        factor_NRR = one_NRR if factor_NRR is None else one_NRR @ factor_NRR
        gram_NRR = one_NRR @ gram_NRR @ one_NRR
    assert factor_NRR is not None  # there is at least one iteration
    return factor_NRR


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)
