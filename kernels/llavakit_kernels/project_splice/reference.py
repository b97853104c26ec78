"""project_splice in eager PyTorch: the reference of the kernels, and the implementation on a CPU.

Like them it writes each row of the stream once, and never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llavakit_kernels import onednn


def forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    embedding: Tensor,
    visual_rows: Tensor,
    sources: Tensor,
    *,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the stream [T, E]; arguments as in project_splice, already checked.

    out: write to this tensor.
    """
    T, N = token_ids.shape[0], features.shape[0]
    if out is None:
        out = torch.empty(T, embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
    text_rows = _text_rows(sources, N)
    text = embedding.index_select(0, token_ids.index_select(0, text_rows))
    out.index_copy_(0, text_rows, text)
    visual = onednn.chosen(impl)[0](features, weight, bias).to(out.dtype)
    return out.index_copy_(0, visual_rows.long(), visual)


def features_grad(grad: Tensor, weight: Tensor, visual_rows: Tensor, impl: str = "auto") -> Tensor:
    """Return the features' gradient [N, D] from the stream's gradient [T, E]."""
    rows = grad.index_select(0, visual_rows).to(weight.dtype)
    return onednn.chosen(impl)[1](rows, weight)


def weight_grad(
    grad: Tensor, features: Tensor, visual_rows: Tensor, with_bias: bool, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight [E, D] and bias [E], or [0] without a bias."""
    rows = grad.index_select(0, visual_rows).to(features.dtype)
    weight_grad = onednn.chosen(impl)[1](rows.t(), features)
    return weight_grad, rows.sum(0) if with_bias else rows.new_empty(0)


def embedding_grad(grad: Tensor, token_ids: Tensor, sources: Tensor, V: int, N: int) -> Tensor:
    """Return the embedding's gradient [V, E]: text rows summed by token id."""
    text_rows = _text_rows(sources, N)
    rows = grad.index_select(0, text_rows)
    # In 16 bits torch rounds after each row that it adds, so sums are made in float32.
    exact = rows if rows.element_size() >= 4 else rows.float()
    ids = token_ids.index_select(0, text_rows).long()
    summed: Tensor = torch.ops.aten.embedding_dense_backward(exact, ids, V, -1, False)
    return summed.to(grad.dtype)


def _text_rows(sources: Tensor, visual: int) -> Tensor:
    # The number of text rows is known on the host; a plain `nonzero` would wait for the device.
    return torch.nonzero_static(sources < 0, size=sources.shape[0] - visual).squeeze(1)
