"""Products of float32 matrices on a CPU by oneDNN, in place of the library that PyTorch takes.

Where PyTorch was built with MKL, float32 matrices are multiplied by it, and 16-bit ones by oneDNN,
which lies in the same PyTorch. On AMD's CPUs with AVX512 MKL keeps to half of what the core can do.
With AVX2 alone it is the faster one, and multiplies here, too. The sums of oneDNN are made in
another order, so the last bits differ.

Shapes: R rows, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["Linear", "PatchConv2d", "chosen", "faster_here", "linear", "matmul", "plain"]

_log = logging.getLogger("llavakit")
_Operator = Callable[..., Tensor]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return input @ weight.T + bias, [..., O], with gradients, all products by oneDNN.

    input: [..., I]; weight: [O, I]; bias: [O] or None.

    What is no plain float32 tensor on a CPU (other types and devices, DTensor, products under
    autocast, in torch.compile or an export, or without rows) is left to torch's own function, and
    so is everything where the CPU gains nothing by it or, with one warning, where this PyTorch
    cannot do it.
    """
    if not _fits(input, weight, bias):
        return F.linear(input, weight, bias)
    learns = input.requires_grad or weight.requires_grad
    if torch.is_grad_enabled() and (learns or (bias is not None and bias.requires_grad)):
        return cast("Tensor", _Linear.apply(input, weight, bias))
    return _product(input, weight, bias)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, without gradients, of matrices [R, I] and [I, O], as `linear` does."""
    if not _fits(left, right):
        return left @ right
    return _matmul(left, right)


def chosen(impl: str) -> tuple[_Operator, _Operator]:
    """Return `linear` and `matmul`: these for the implementation "onednn", torch's for others."""
    return (linear, matmul) if impl == "onednn" else (F.linear, torch.matmul)


class Linear(nn.Linear):
    """nn.Linear whose products are oneDNN's. Parameters, names and sizes are the same."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class PatchConv2d(nn.Conv2d):
    """nn.Conv2d of patches side by side, as one product by oneDNN. Parameters are the same.

    Only for a stride as large as the kernel, without padding, dilation or groups.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return [B, O, R, C] of images [B, I, H, W]; an incomplete last patch is left out."""
        high, wide = self.kernel_size
        if input.dim() != 4 or not _fits(input, self.weight, self.bias):
            return super().forward(input)
        rows, columns = input.shape[2] // high, input.shape[3] // wide
        cut = input[:, :, : rows * high, : columns * wide]
        patches = cut.unflatten(3, (columns, wide)).unflatten(2, (rows, high))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, R, C, I * high * wide]
        return linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@functools.cache
def faster_here() -> bool:
    """Return whether the CPU gains by it: with AVX2 alone gradients' products take up to twice as
    long by oneDNN."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def plain(*tensors: Tensor | None) -> bool:
    """Return whether all are plain float32 tensors on a CPU, which are multiplied as they stand."""
    if torch.compiler.is_compiling():  # first: a compiler or an export must not see the rest
        return False
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in (Tensor, nn.Parameter)  # no DTensor, no weights of 4 bits
            and tensor.dtype == torch.float32
            and tensor.is_cpu
            and tensor.layout == torch.strided
            and tensor.numel()
        ):
            return False
    return not torch.is_autocast_enabled("cpu")


def _fits(*tensors: Tensor | None) -> bool:
    return plain(*tensors) and faster_here() and _operator() is not None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return cast("_Operator", _operator())(input, weight, bias, "none", [], "")


def _matmul(left_RI: Tensor, right_IO: Tensor) -> Tensor:
    # the operator copies its first matrix where that does not lie in rows: let it be the smaller
    if not left_RI.is_contiguous() and right_IO.shape[1] < left_RI.shape[0]:
        return _product(right_IO.t(), left_RI).t().contiguous()
    return _product(left_RI, right_IO.t())


@functools.cache
def _operator() -> _Operator | None:
    """Return the operator, found and tried once; None, with a warning, where there is none.

    It is the one that torch.compile puts into its own graphs, and no public one.
    """
    try:
        found = cast("_Operator", torch.ops.mkldnn._linear_pointwise.default)
        left, right = torch.ones(2, 3), torch.ones(4, 3)
        tried = found(left, right, torch.ones(4), "none", [], "")
        # the gradients' products read matrices by columns
        columns = found(left.t(), tried.t(), None, "none", [], "")
        if not (bool((tried == 4).all()) and bool((columns == 8).all())):
            raise RuntimeError("its products are wrong")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _log.warning(
            "PyTorch %s has no products by oneDNN (`onednn`) on this machine (%s); torch's own are "
            "used",
            torch.__version__, reason,
        )  # fmt: skip
        return None
    return found


class _Linear(torch.autograd.Function):
    """The product, and in the backward pass those of the gradients that are needed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_input, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if for_weight else None, weight if for_input else None)
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        for_input, for_weight, for_bias = ctx.needs_input_grad
        grad_RO = grad.reshape(-1, grad.shape[-1])
        return (
            _product(grad, weight.t()) if for_input else None,
            _matmul(grad_RO.t(), input.reshape(-1, input.shape[-1])) if for_weight else None,
            grad_RO.sum(0) if for_bias else None,
        )
