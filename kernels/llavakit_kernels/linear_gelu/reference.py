"""linear_gelu in eager PyTorch: what the kernels must equal, and the way on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """The activations [N, H], and what went into GELU: [N, H] with save, else [0]."""
    before = F.linear(features, weight, bias)
    return F.gelu(before), before if save else before.new_empty(0)


def before_grad(grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient before GELU [N, H], with the product computed once more."""
    before = F.linear(features, weight, bias)
    before_grad: Tensor = torch.ops.aten.gelu_backward(grad, before)
    return before_grad
