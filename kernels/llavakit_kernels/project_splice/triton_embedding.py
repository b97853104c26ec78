# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""The gradient of the embedding table, from the text rows of the stream's gradient."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from llavakit_kernels.launch import rows_contiguous

COLUMNS, CHUNK = 512, 8


@triton.jit(do_not_specialize=["T", "V"])
def segments_kernel(
    grad,
    sorted_ids,
    order,
    table_grad,
    T,
    V,
    E,
    grad_stride,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program for each position in the sorted ids. The program at the first position of an id
    sums all rows of this id, in order; the others end at once."""
    position = tl.program_id(0)
    at_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at_column < E
    token = tl.load(sorted_ids + position)
    before = tl.load(sorted_ids + position - 1, mask=position > 0, other=-1)
    if (token != before) & (token >= 0) & (token < V):
        sums = tl.zeros((COLUMNS,), tl.float32)
        start = position
        found = CHUNK
        # the ids are sorted: a chunk that is not full of this id is the last that holds it
        while found == CHUNK:
            at = start + tl.arange(0, CHUNK)
            same = tl.load(sorted_ids + at, mask=at < T, other=-1) == token
            rows = tl.load(order + at, mask=same, other=0).to(tl.int64)
            values = tl.load(
                grad + rows[:, None] * grad_stride + at_column[None, :],
                mask=same[:, None] & inside[None, :],
                other=0.0,
            )
            sums += tl.sum(values.to(tl.float32), 0)
            found = tl.sum(same.to(tl.int32), 0)
            start += CHUNK
        at_table = token.to(tl.int64) * E + at_column
        tl.store(table_grad + at_table, sums.to(table_grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "V"])
def atomics_kernel(
    grad,
    token_ids,
    sources,
    table_grad,
    T,
    V,
    E,
    grad_stride,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds each text row to the row of its id, by atomics, in no fixed order."""
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    at_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    text = tl.load(sources + at, mask=at < T, other=0) < 0
    ids = tl.load(token_ids + at, mask=text, other=-1).to(tl.int64)
    mask = (text & (ids >= 0) & (ids < V))[:, None] & (at_column < E)[None, :]
    values = tl.load(
        grad + at.to(tl.int64)[:, None] * grad_stride + at_column[None, :], mask=mask, other=0.0
    )
    tl.atomic_add(
        table_grad + ids[:, None] * E + at_column[None, :],
        values.to(tl.float32),
        mask=mask,
        sem="relaxed",
    )


def embedding_grad(
    grad: Tensor, token_ids: Tensor, sources: Tensor, V: int, deterministic: bool
) -> Tensor:
    """Return grad [T, E] summed by token id over the text rows: [V, E] in the gradient's dtype.

    deterministic: after a sort, the rows of one id are added in their order; otherwise by atomics
    in float32, in no fixed order.
    """
    T, E = grad.shape
    # Atomics in 16 bits would round after each addition.
    dtype = grad.dtype if deterministic else torch.float32
    table_grad = torch.zeros(V, E, dtype=dtype, device=grad.device)
    if T == 0 or table_grad.numel() == 0:
        return table_grad.to(grad.dtype)
    grad = rows_contiguous(grad)
    shape = {"COLUMNS": min(COLUMNS, triton.next_power_of_2(E)), "CHUNK": CHUNK}
    columns = triton.cdiv(E, shape["COLUMNS"])
    with torch.cuda.device(grad.device) if grad.is_cuda else contextlib.nullcontext():
        if deterministic:
            # visual rows get the id V, which the kernel skips; a stable sort keeps the rows' order
            ids = torch.where(sources < 0, token_ids, V)
            ids, order = torch.sort(ids, stable=True)
            segments_kernel[(T, columns)](
                grad, ids, order, table_grad, T, V, E, grad.stride(0), **shape
            )
        else:
            atomics_kernel[(triton.cdiv(T, CHUNK), columns)](
                grad,
                token_ids.contiguous(),
                sources.contiguous(),
                table_grad,
                T,
                V,
                E,
                grad.stride(0),
                **shape,
            )
    return table_grad.to(grad.dtype)
