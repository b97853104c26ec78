"""linear_cross_entropy with liger-kernel (arXiv 2410.10989), if it is installed and fits."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("liger_kernel") is not None


def misfit(hidden: Tensor, weight: Tensor, bias: Tensor | None, weighted: bool) -> str | None:
    """Return the reason why liger-kernel cannot serve these tensors, or None if it can."""
    if not INSTALLED:
        return "liger-kernel is not installed (pip install liger-kernel)"
    if not hidden.is_cuda:
        return f"the tensors are on {hidden.device}, and its kernels need a GPU"
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernels do not take {hidden.dtype}"
    if weighted:
        return "it has no weights for rows"
    if not hidden.requires_grad and any(
        given is not None and given.requires_grad for given in (weight, bias)
    ):
        return "it computes the head's gradient only beside that of the hidden states"
    if torch.compiler.is_compiling():
        return "it reads the device back to the host, which breaks a compiled graph"
    return None


def loss_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int
) -> Tensor:
    """Return the sum of the rows' losses, a scalar; shapes as in linear_cross_entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias,
        ignore_index=ignore_index,
        reduction="sum",
        accum_dtype=torch.float32,  # its default adds the weight's gradient up in 16 bits
    )
    return loss
