"""linear_gelu in eager PyTorch: the reference of the kernels, and the implementation on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit_kernels import onednn


def forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, save: bool, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the activations [N, H], and GELU's argument: [N, H] with save, else [0]."""
    before = onednn.chosen(impl)[0](features, weight, bias)
    return F.gelu(before), before if save else before.new_empty(0)


def before_grad(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, impl: str = "auto"
) -> Tensor:
    """Return the gradient by GELU's argument, [N, H]; the product is computed again."""
    before = onednn.chosen(impl)[0](features, weight, bias)
    before_grad: Tensor = torch.ops.aten.gelu_backward(grad, before)
    return before_grad
