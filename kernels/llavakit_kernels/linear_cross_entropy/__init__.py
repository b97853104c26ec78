"""The language model's head and its cross-entropy, without all logits in memory at once.

For M supervised rows and a vocabulary V, the logits, their softmax and their gradient have M x V
elements each: gigabytes, while hidden states take megabytes. Here they exist for one chunk of rows
at a time. Liger-Kernel (arXiv 2410.10989) does the same on GPUs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit_kernels import arguments, onednn
from llavakit_kernels.arguments import require
from llavakit_kernels.linear_cross_entropy import liger, reference
from llavakit_kernels.operators import Operator

__all__ = ["linear_cross_entropy"]

# Below this number of logits the operator's overhead exceeds its gain (measured on a CPU).
SMALL = 2**21


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    impl: Literal["auto", "reference", "liger", "onednn"] = "auto",
) -> Tensor:
    """Return cross_entropy(hidden @ weight.T + bias, targets), a scalar in float32 (float64 for
    float64).

    hidden: [M, E]; weight: [V, E]; bias: [V] or None; all of one floating dtype (under
    torch.autocast they are cast to its dtype).
    targets: [M] int; rows with ignore_index do not count.
    weights: [M] floating or None, a factor for each row's loss.
    reduction: "sum", for callers that add micro-batches up and divide once; or "mean", the sum
    divided by the weights of the rows that count (NaN if there are none, as in torch).
    chunk_rows: number of rows whose logits exist at one time; by default 2^26 logits on a CPU and
    2^27 on a GPU. Without it, at most 2^21 logits are left to torch's own functions.
    impl: chunks in eager PyTorch ("reference", and "auto"), or liger-kernel's kernels ("liger"),
    which count the targets on the host, so that each call waits for the device. "onednn" is
    "reference" with the products of `llavakit_kernels.onednn` on a CPU.

    Gradients are computed in the forward pass, chunk by chunk, so that no logits are computed
    twice; and only those that are needed, so that a frozen head costs no product for its weight.
    With a single chunk, the logits' gradient is kept instead, and its products run in the backward
    pass: the factor from the loss is then applied to [M, E] and not to [V, E].

    Raises ValueError if a shape, dtype or device does not fit.
    """
    arguments.require_shape("hidden", hidden, "ME", None, None)
    M, E = hidden.shape
    arguments.require_shape("weight", weight, "VE", None, E)
    arguments.require_shape("targets", targets, "M", M)
    if bias is not None:
        arguments.require_shape("bias", bias, "V", weight.shape[0])
    if weights is not None:
        arguments.require_shape("weights", weights, "M", M)
    arguments.require_indices("targets", targets)
    arguments.require_same_device(
        hidden=hidden, weight=weight, targets=targets, bias=bias, weights=weights
    )
    require(
        reduction in ("mean", "sum"),
        f'`reduction` must be "mean" or "sum", but is {reduction!r}',
    )
    require(
        impl in ("auto", "reference", "liger", "onednn"),
        f'`impl` must be "auto", "reference", "liger" or "onednn", but is {impl!r}',
    )
    require(
        chunk_rows is None or chunk_rows > 0,
        f"`chunk_rows` must be a positive number of rows, but is {chunk_rows}",
    )
    dtype = arguments.autocast_dtype(hidden.device)
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    arguments.require_same_dtype(hidden=hidden, weight=weight, bias=bias)

    # the losses and their sum: in 16 bits a sum over thousands of rows would lose small terms
    kept = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if chunk_rows is None and weights is None and impl != "liger" and M * weight.shape[0] <= SMALL:
        with arguments.without_autocast(hidden.device):
            linear, _ = onednn.chosen(impl)
            logits = linear(hidden, weight, bias).to(kept)
            return F.cross_entropy(
                logits, targets.long(), reduction=reduction, ignore_index=ignore_index
            )

    counts = targets != ignore_index
    row_weights = counts.to(kept) if weights is None else weights.to(kept).where(counts, 0)
    with arguments.without_autocast(hidden.device):
        if impl == "liger":
            reason = liger.misfit(hidden, weight, bias, weights is not None)
            require(reason is None, f'impl="liger" cannot serve here: {reason}; use impl="auto"')
            loss = liger.loss_sum(hidden, weight, bias, targets.long(), ignore_index)
        else:
            # any valid class does: these rows have the weight 0,
            # but their loss is read before it is multiplied
            targets = targets.long().where(counts, 0)
            loss = _chunked(hidden, weight, bias, targets, row_weights, chunk_rows, impl)
    return loss if reduction == "sum" else loss / row_weights.sum()


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor,
    chunk_rows: int | None,
    impl: str,
) -> Tensor:
    learns = torch.is_grad_enabled()
    loss: Tensor = _loss(
        hidden,
        weight,
        bias,
        targets,
        row_weights.detach(),
        chunk_rows or reference.chunk_rows(hidden.shape[0], weight.shape[0], hidden.device.type),
        learns and hidden.requires_grad,
        learns and weight.requires_grad,
        learns and bias is not None and bias.requires_grad,
        impl,
    )[0]
    return loss


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor,
    chunk_rows: int,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = reference.Needs(for_hidden, for_weight, for_bias)
    given = (hidden, weight, bias, targets, row_weights)
    return reference.forward(*given, needs, chunk_rows, impl)


_loss = Operator("linear_cross_entropy", _forward)


@_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor,
    chunk_rows: int,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (M, E), V = hidden.shape, weight.shape[0]
    one_chunk = chunk_rows >= M
    kept = one_chunk and (for_hidden or for_weight or for_bias)
    return (
        row_weights.new_empty(()),
        hidden.new_empty((M, E) if for_hidden and not one_chunk else (0,)),
        hidden.new_empty((V, E) if for_weight and not one_chunk else (0,)),
        hidden.new_empty(V if for_bias and not one_chunk else 0),
        hidden.new_empty((M, V) if kept else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, _, row_weights, chunk_rows, *_, ctx.impl = inputs
    # only the loss has a gradient; the other outputs are the gradients computed in the forward
    ctx.mark_non_differentiable(*output[1:])
    # otherwise autograd would fill zeros of up to [M, V] for the outputs that have no gradient
    ctx.set_materialize_grads(False)
    ctx.one_chunk = hidden.shape[0] <= chunk_rows
    for_hidden, for_weight, *_ = ctx.needs_input_grad
    if ctx.one_chunk:
        ctx.save_for_backward(
            output[4],
            row_weights,
            hidden if for_weight else None,
            weight if for_hidden else None,
        )
    else:
        ctx.save_for_backward(*output[1:4])


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    for_hidden, for_weight, for_bias, *rest = ctx.needs_input_grad
    gradients: list[Tensor | None] = [None, None, None]
    if grad is None:
        pass
    elif ctx.one_chunk:
        logits_grad, row_weights, hidden, weight = ctx.saved_tensors
        matmul = onednn.chosen(ctx.impl)[1]
        scale = (grad * row_weights).to(logits_grad.dtype)
        if for_hidden:
            gradients[0] = matmul(logits_grad, weight) * scale[:, None]
        if for_weight:
            gradients[1] = matmul(logits_grad.t(), hidden * scale[:, None])
        if for_bias:
            gradients[2] = scale @ logits_grad
    else:
        needed = (for_hidden, for_weight, for_bias)
        for index, (one, computed) in enumerate(zip(needed, ctx.saved_tensors, strict=True)):
            if one:
                gradients[index] = computed * grad.to(computed.dtype)
    return (*gradients, *(None,) * len(rest))


_loss.register_autograd(_backward, setup_context=_setup_context)
