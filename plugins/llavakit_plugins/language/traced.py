"""Attention over a packed stream within a block that is compiled by itself.

A block is compiled once for streams of any length and any number of samples. A graph cannot loop
over a number of samples that changes, so it is handed a `Traced` stream, whose parts are tensors
and one number. On CUDA in half precision PyTorch's variable-length attention becomes part of the
graph. Anything else is one operator, behind which each sample is read by itself as ever.

T rows, S samples, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from llavakit import packed_attention
from llavakit.contracts.packing import Packing, Scoring
from llavakit_plugins.language import varlen


class Traced:
    """A stream as a graph sees it; stands for a `Packing` in the arguments of a block.

    No subclass, and nothing but what a block may ask: a graph holds for streams in which everything
    that it has seen on the host is the same.
    """

    cache = watch = None

    def __init__(self, packing: Packing) -> None:
        self.position_ids_T = packing.position_ids_T
        count = len(packing.starts)
        self.bounds_S = mark_rows(packing.bounds_S, count)
        self.starts_S = mark_rows(torch.tensor(packing.starts), count)  #: On the host, int64.
        self.longest = max(packing.lengths)
        self.fuses = varlen.is_recent(packing.position_ids_T.device)
        self.attended = False  #: Whether the block at work has called `attend`.
        self.blocks = 0  #: How many compiled blocks have.

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scoring: Scoring) -> Tensor:
        """Return what `packed_attention` does, which calls this."""
        self.attended = True
        width, half = q_THK.shape[-1], q_THK.dtype in (torch.bfloat16, torch.float16)
        if self.fuses and half and width == v_TGK.shape[-1] and varlen.fits_torch(scoring, width):
            kernel = (self.bounds_S, self.longest, scoring)
            return varlen.attend_by_torch(q_THK, k_TGK, v_TGK, *kernel)
        how = (scoring.scale, scoring.window, scoring.softcap, scoring.sinks_H)
        return cast("Tensor", _attend(q_THK, k_TGK, v_TGK, self.starts_S, *how))


def mark_rows(tensor: Tensor, count: int) -> Tensor:
    """Mark the first dimension of this size as one that changes; return the tensor.

    A graph would hold it for the same as any other of that size: for the width, where there are as
    many rows by chance.
    """
    if count in tensor.shape:
        torch._dynamo.maybe_mark_dynamic(tensor, tensor.shape.index(count))
    return tensor


class _Current:
    """The stream that passes the blocks now, for blocks that are not handed any."""

    stream: Traced | None = None


current = _Current()


@lru_cache(maxsize=2)
def _packing(starts: tuple[int, ...], device: torch.device) -> Packing:
    """Return the packing of a stream, with what its first layer keeps in it for the next ones."""
    return Packing.of([b - a for a, b in pairwise(starts)], device)


def _by_sample(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, starts_S: Tensor,
    scale: float | None, window: int | None, softcap: float | None, sinks_H: Tensor | None,
) -> Tensor:  # fmt: skip
    packing = _packing(tuple(starts_S.tolist()), q_THK.device)
    return packed_attention(
        q_THK, k_TGK, v_TGK, packing,
        layer=0, scale=scale, window=window, softcap=softcap, sinks_H=sinks_H,
    )  # fmt: skip


@torch.library.custom_op("llavakit::packed_attention", mutates_args=())
def _attend(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, starts_S: Tensor,
    scale: float | None, window: int | None, softcap: float | None, sinks_H: Tensor | None,
) -> Tensor:  # fmt: skip
    return _by_sample(q_THK, k_TGK, v_TGK, starts_S, scale, window, softcap, sinks_H).contiguous()


@_attend.register_fake
def _(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, starts_S: Tensor,
    scale: float | None, window: int | None, softcap: float | None, sinks_H: Tensor | None,
) -> Tensor:  # fmt: skip
    return q_THK.new_empty((*q_THK.shape[:2], v_TGK.shape[2]))


@torch.library.custom_op("llavakit::packed_attention_grads", mutates_args=())
def _grads(
    grad_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, starts_S: Tensor,
    scale: float | None, window: int | None, softcap: float | None, sinks_H: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of queries, keys, values and, where there are any, sinks.

    The forward pass is run again: an operator has no graph of its own to keep.
    """
    given = [q_THK, k_TGK, v_TGK] + ([] if sinks_H is None else [sinks_H])

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return _by_sample(q, k, v, starts_S, scale, window, softcap, sinks)

    with torch.enable_grad():
        pull: Any = torch.func.vjp(attend, *given)[1]
        return [grad.contiguous() for grad in pull(grad_THK)]


@_grads.register_fake
def _(
    grad_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, starts_S: Tensor,
    scale: float | None, window: int | None, softcap: float | None, sinks_H: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    given = [q_THK, k_TGK, v_TGK] + ([] if sinks_H is None else [sinks_H])
    return [one.new_empty(one.shape) for one in given]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale, window, softcap, sinks_H = inputs
    ctx.save_for_backward(*tensors, sinks_H)
    ctx.how = (scale, window, softcap)


def _backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, sinks_H = ctx.saved_tensors
    q_grad, k_grad, v_grad, *sinks_grad = _grads(grad_THK, *tensors, *ctx.how, sinks_H)
    return q_grad, k_grad, v_grad, None, None, None, None, sinks_grad[0] if sinks_grad else None


_attend.register_autograd(_backward, setup_context=_setup_context)
