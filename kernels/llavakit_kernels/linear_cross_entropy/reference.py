"""linear_cross_entropy chunk by chunk in eager PyTorch, with gradients.

Let p be the softmax of a row's logits. The gradient of the row's loss by the logits is
p - onehot(target). A chunk's logits are turned into it in place and used for both products (those
of hidden states and weight) before the next chunk takes their memory. So nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit_kernels import onednn

# Number of logits in a chunk: a few hundred megabytes, with enough rows for a fast product.
LOGITS = {"cpu": 2**26, "cuda": 2**27}


def chunk_rows(rows: int, vocabulary: int, device: str) -> int:
    """Return the rows of a chunk: as many as LOGITS allows, in chunks of nearly equal size."""
    most = max(1, LOGITS.get(device, LOGITS["cuda"]) // max(1, vocabulary))
    chunks = max(1, -(-rows // most))
    return -(-rows // chunks)


@dataclass(frozen=True)
class Needs:
    """The gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor,
    needs: Needs,
    rows: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the weighted sum of the rows' losses, and the gradients or what gives them.

    row_weights: [M], zero for rows that do not count; targets: [M], valid in every row.
    If one chunk of `rows` holds all: (loss, [0], [0], [0], the logits' gradient [M, V]).
    Otherwise: (loss, hidden's gradient [M, E], weight's [V, E], bias's [V], [0]).
    """
    linear, matmul = onednn.chosen(impl)
    M = hidden.shape[0]
    kept = row_weights.dtype
    loss = torch.zeros((), dtype=kept, device=hidden.device)
    none = hidden.new_empty(0)
    if rows >= M:
        one, logits_grad = _chunk(linear, hidden, weight, bias, targets, row_weights, needs.any())
        return loss + one, none, none.clone(), none.clone(), logits_grad

    # Sums over many chunks stay in float32 where the weights are 16 bits wide.
    hidden_grad = torch.empty_like(hidden) if needs.hidden else none
    weight_grad = weight.new_zeros(weight.shape if needs.weight else (0,), dtype=kept)
    bias_grad = weight.new_zeros(weight.shape[0] if needs.bias else 0, dtype=kept)
    for start in range(0, M, rows):
        part = slice(start, start + rows)
        one, logits_grad = _chunk(
            linear, hidden[part], weight, bias, targets[part], row_weights[part], needs.any()
        )
        loss += one
        scale = row_weights[part].to(hidden.dtype)
        if needs.hidden:
            product = hidden_grad[part]
            if impl == "onednn":
                product.copy_(onednn.matmul(logits_grad, weight))
            else:
                torch.mm(logits_grad, weight, out=product)
            product *= scale[:, None]
        if needs.weight:
            scaled = hidden[part] * scale[:, None]
            # in place, without another [V, E] for the product; `addmm_` needs equal dtypes
            if weight_grad.dtype == weight.dtype and impl != "onednn":
                weight_grad.addmm_(logits_grad.t(), scaled)
            else:
                weight_grad += matmul(logits_grad.t(), scaled)
        if needs.bias:
            bias_grad += scale @ logits_grad
        del logits_grad  # free it before the next chunk's logits are allocated
    return (
        loss,
        hidden_grad,
        weight_grad.to(weight.dtype),
        bias_grad.to(weight.dtype),
        none.clone(),
    )


def _chunk(
    linear: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the chunk's loss, and p - onehot(target) in the hidden states' dtype.

    Without `gradient` the second tensor is empty.
    """
    log_p = torch.log_softmax(linear(hidden, weight, bias), -1, dtype=row_weights.dtype)
    at_target = targets[:, None]
    loss = -(log_p.gather(1, at_target).squeeze(1) * row_weights).sum()
    if not gradient:
        return loss, hidden.new_empty(0)
    p = log_p.exp_()  # in place: a second tensor of this size would double the memory
    p.scatter_add_(1, at_target, p.new_full((1, 1), -1.0).expand_as(at_target))
    return loss, p.to(hidden.dtype)
