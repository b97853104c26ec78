"""A linear layer and GELU in one launch, for the hidden layers of the connector `mlp`.

LLaVA-1.5 (arXiv 2310.03744, section 3.2) has a two-layer MLP instead of a linear projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llavakit_kernels import arguments, onednn
from llavakit_kernels.arguments import Impl
from llavakit_kernels.linear_gelu import reference
from llavakit_kernels.operators import Operator

__all__ = ["linear_gelu"]


def linear_gelu(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    impl: Impl = "auto",
    recompute: bool = False,
) -> Tensor:
    """Return gelu(features @ weight.T + bias), [N, H], with GELU in its exact erf form.

    features: [N, D]; weight: [H, D]; bias: [H] or None; all of one floating dtype, which is also
    the result's (under torch.autocast they are cast to its dtype).
    impl: as in project_splice.
    recompute: compute GELU's argument [N, H] again in the backward pass instead of keeping it: less
    memory for one more product.

    Raises ValueError if a shape, dtype or device does not fit.
    """
    arguments.require_shape("features", features, "ND", None, None)
    arguments.require_shape("weight", weight, "HD", None, features.shape[1])
    if bias is not None:
        arguments.require_shape("bias", bias, "H", weight.shape[0])
    arguments.require_same_device(features=features, weight=weight, bias=bias)
    dtype = arguments.autocast_dtype(features.device)
    if dtype is not None:
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    arguments.require_same_dtype(features=features, weight=weight, bias=bias)
    # else nothing is kept for a backward pass that never comes
    learns = torch.is_grad_enabled() and any(
        given is not None and given.requires_grad for given in (features, weight, bias)
    )
    with arguments.without_autocast(features.device):
        out: Tensor = _gelu(features, weight, bias, impl, learns and not recompute)[0]
    return out


def _forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, impl: str, save: bool
) -> tuple[Tensor, Tensor]:
    if arguments.choose(impl, features) == "reference":
        return reference.forward(features, weight, bias, save, impl)
    from llavakit_kernels.linear_gelu import triton

    return triton.forward(features, weight, bias, save)


_gelu = Operator("linear_gelu", _forward)


@_gelu.register_fake
def _(
    features: Tensor, weight: Tensor, bias: Tensor | None, impl: str, save: bool
) -> tuple[Tensor, Tensor]:
    N, H = features.shape[0], weight.shape[0]
    # an operator must return a tensor: an empty one stands for none
    return features.new_empty(N, H), features.new_empty((N, H) if save else (0,))


def _before_grad(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, impl: str
) -> Tensor:
    if arguments.choose(impl, features) == "reference":
        return reference.before_grad(grad, features, weight, bias, impl)
    from llavakit_kernels.linear_gelu import triton

    return triton.before_grad(grad, features, weight, bias)


_for_before = Operator("linear_gelu_before_grad", _before_grad)


@_for_before.register_fake
def _(grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return features.new_empty(features.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, weight, bias, ctx.impl, ctx.saved = inputs
    ctx.mark_non_differentiable(output[1])  # only the backward pass reads it
    for_features, for_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        features if for_weight or not ctx.saved else None,
        weight if for_features or not ctx.saved else None,
        None if ctx.saved else bias,
        output[1] if ctx.saved else None,
    )


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    features, weight, bias, before = ctx.saved_tensors
    for_features, for_weight, for_bias, *_rest = ctx.needs_input_grad
    if ctx.saved:
        before_grad = torch.ops.aten.gelu_backward(grad, before)
    else:
        before_grad = _for_before(grad, features, weight, bias, ctx.impl)
    # Plain products, without gather or scatter: the vendor's library is the fastest for these.
    matmul = onednn.chosen(ctx.impl)[1]
    return (
        matmul(before_grad, weight) if for_features else None,
        matmul(before_grad.t(), features) if for_weight else None,
        before_grad.sum(0) if for_bias else None,
        None,
        None,
    )


_gelu.register_autograd(_backward, setup_context=_setup_context)
