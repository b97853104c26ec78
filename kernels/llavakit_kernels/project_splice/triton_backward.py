# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""The backward pass of project_splice for the features and the weight.

Both products read the rows of the incoming gradient directly from the stream: the gather is part of
the product's loads, and the rows are never copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from llavakit_kernels.launch import (
    descriptor,
    launch,
    precision,
    processors,
    rows_contiguous,
    size_class,
    takes_descriptor,
    weight_grad_tile,
)
from llavakit_kernels.tiles import load_rows, load_tile, multiply, tile_at


@triton.jit(do_not_specialize=["N", "T", "size_class"])
def features_grad_kernel(
    grad,
    right_inner,
    visual_rows,
    out,
    N,
    T,
    E,
    D,
    grad_stride,
    right_stride,
    out_stride,
    size_class,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[N, D] = grad[visual_rows] @ weight; `right_inner` is the weight [E, D]."""
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_n = tl.cdiv(D, BLOCK_N)
    m, n = tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    at = m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(visual_rows + at, mask=at < N, other=-1).to(tl.int64)
    valid = (rows >= 0) & (rows < T)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(E, BLOCK_K)):
        k = step * BLOCK_K
        a = load_rows(grad, rows, valid, k, E, grad_stride, BLOCK_K)
        b = load_tile(right_inner, k, n * BLOCK_N, E, D, right_stride, BLOCK_K, BLOCK_N, TMA)
        sums = multiply(a, b, sums, PRECISION)
    at_column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(
        out + at.to(tl.int64)[:, None] * out_stride + at_column[None, :],
        sums.to(out.dtype.element_ty),
        mask=(at < N)[:, None] & (at_column < D)[None, :],
    )


@triton.jit
def _weight_grad_sums(
    grad,
    right_inner,
    visual_rows,
    row,
    rows_end,
    e,
    d,
    T,
    E,
    D,
    grad_stride,
    right_stride,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
):
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # In 16 bits the columns are summed by a product with ones: a reduction between the tensor
    # cores' asynchronous products would make the compiler run these one after another.
    BY_PRODUCT: tl.constexpr = COLUMN_SUMS and grad.dtype.element_ty.primitive_bitwidth == 16
    ones = tl.full((BLOCK_K, 16), 1.0, tl.float32).to(grad.dtype.element_ty)
    products = tl.zeros((BLOCK_M, 16), tl.float32)
    column_sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(row, rows_end, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        rows = tl.load(visual_rows + at, mask=at < rows_end, other=-1).to(tl.int64)
        valid = (rows >= 0) & (rows < T)
        a = load_rows(grad, rows, valid, e, E, grad_stride, BLOCK_M)
        b = load_tile(right_inner, start, d, rows_end, D, right_stride, BLOCK_K, BLOCK_N, TMA)
        if BY_PRODUCT:
            products = multiply(a.T, ones, products, PRECISION)
        elif COLUMN_SUMS:
            column_sums += tl.sum(a.to(tl.float32), 0)
        sums = multiply(a.T, b, sums, PRECISION)
    if BY_PRODUCT:  # all 16 columns hold the same sums: take the first
        column_sums = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, products, 0.0), 1)
    return sums, column_sums


@triton.jit(do_not_specialize=["N", "T", "rows_each"])
def weight_grad_kernel(
    grad,
    right_inner,
    visual_rows,
    weight_grad,
    bias_grad,
    N,
    T,
    E,
    D,
    rows_each,
    grad_stride,
    right_stride,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """weight_grad[part] = grad[visual_rows].T @ right_inner and bias_grad[part] = sum of the rows,
    both over the `rows_each` visual tokens of the part."""
    tiles_m = tl.cdiv(E, BLOCK_M)
    tiles_n = tl.cdiv(D, BLOCK_N)
    m, n = tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    part = tl.program_id(1)
    row = part * rows_each
    rows_end = min(row + rows_each, N)
    e, d = m * BLOCK_M, n * BLOCK_N
    at_row = e + tl.arange(0, BLOCK_M)
    # Two loops, because only the first column of tiles sums the rows; a branch within one loop
    # would slow down all tiles.
    if HAS_BIAS and n == 0:
        sums, column_sums = _weight_grad_sums(
            grad,
            right_inner,
            visual_rows,
            row,
            rows_end,
            e,
            d,
            T,
            E,
            D,
            grad_stride,
            right_stride,
            TMA,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            True,
        )
        tl.store(bias_grad + part * E + at_row, column_sums, mask=at_row < E)
    else:
        sums, column_sums = _weight_grad_sums(
            grad,
            right_inner,
            visual_rows,
            row,
            rows_end,
            e,
            d,
            T,
            E,
            D,
            grad_stride,
            right_stride,
            TMA,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            False,
        )
    at_column = d + tl.arange(0, BLOCK_N)
    row_of_part = part.to(tl.int64) * E + at_row
    tl.store(
        weight_grad + row_of_part[:, None] * D + at_column[None, :],
        sums.to(weight_grad.dtype.element_ty),
        mask=(at_row < E)[:, None] & (at_column < D)[None, :],
    )


def features_grad(
    grad: Tensor,
    weight: Tensor,
    visual_rows: Tensor,
    *,
    out: Tensor | None = None,
    config: triton.Config | None = None,
    tma: bool = True,
) -> Tensor:
    """Return grad [T, E] at the visual rows times weight [E, D]: [N, D] in the weight's dtype."""
    N, T, (E, D) = visual_rows.shape[0], grad.shape[0], weight.shape
    if out is None:
        out = torch.empty(N, D, dtype=weight.dtype, device=weight.device)
    if N == 0 or D == 0:
        return out
    grad, right = rows_contiguous(grad), rows_contiguous(weight)
    tma = tma and takes_descriptor(right)

    def grid(meta: Mapping[str, int]) -> tuple[int, ...]:
        return (triton.cdiv(N, meta["BLOCK_M"]) * triton.cdiv(D, meta["BLOCK_N"]),)

    arguments = {
        "grad": grad,
        "right_inner": descriptor(right) if tma else right,
        "visual_rows": visual_rows.contiguous(),
        "out": out,
        "N": N,
        "T": T,
        "E": E,
        "D": D,
        "grad_stride": grad.stride(0),
        "right_stride": right.stride(0),
        "out_stride": out.stride(0),
        "size_class": size_class(N),
        "TMA": tma,
        "PRECISION": precision(right),
    }
    launch(features_grad_kernel, grid, arguments, right, config)
    return out


def weight_grad(
    grad: Tensor,
    features: Tensor,
    visual_rows: Tensor,
    with_bias: bool,
    *,
    config: triton.Config | None = None,
    tma: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight [E, D] and bias [E] (or [0]), in the features' dtype.

    If the tiles alone would leave multiprocessors idle, the sums over visual tokens are split into
    parts. Parts are added in a fixed order, so that equal inputs give equal bits.
    """
    (N, D), (T, E) = features.shape, grad.shape
    config = weight_grad_tile(features) if config is None else config
    tiles = triton.cdiv(E, config.kwargs["BLOCK_M"]) * triton.cdiv(D, config.kwargs["BLOCK_N"])
    parts = _parts(tiles, N, processors(features.device))
    # Every part but the last is a multiple of 64 rows, the largest inner step: a descriptor masks
    # rows behind the end of the matrix, but not behind the end of a part.
    rows_each = triton.cdiv(triton.cdiv(N, parts), 64) * 64
    parts = max(1, triton.cdiv(N, rows_each)) if N else 1
    kept = torch.float32 if parts > 1 else features.dtype
    weight_sums = torch.empty(parts, E, D, dtype=kept, device=grad.device)
    bias_sums = torch.empty(parts, E if with_bias else 0, dtype=torch.float32, device=grad.device)
    if weight_sums.numel() == 0:
        return weight_sums[0].zero_(), bias_sums[0].zero_().to(features.dtype)
    grad, right = rows_contiguous(grad), rows_contiguous(features)
    tma = tma and takes_descriptor(right)
    arguments = {
        "grad": grad,
        "right_inner": descriptor(right) if tma else right,
        "visual_rows": visual_rows.contiguous(),
        "weight_grad": weight_sums,
        "bias_grad": bias_sums,
        "N": N,
        "T": T,
        "E": E,
        "D": D,
        "rows_each": rows_each,
        "grad_stride": grad.stride(0),
        "right_stride": right.stride(0),
        "HAS_BIAS": with_bias,
        "TMA": tma,
        "PRECISION": precision(right),
    }
    launch(weight_grad_kernel, lambda _: (tiles, parts), arguments, features, config)
    if parts == 1:
        return weight_sums[0], bias_sums[0].to(features.dtype)
    return weight_sums.sum(0).to(features.dtype), bias_sums.sum(0).to(features.dtype)


def _parts(tiles: int, rows: int, units: int) -> int:
    """Return the fewest parts that keep 90 % of the multiprocessors busy, or the best choice."""

    def busy(parts: int) -> float:
        rounds: int = triton.cdiv(tiles * parts, units)
        return tiles * parts / (rounds * units)

    # each part writes and reads one more [E, D] in float32, which short parts would not repay
    choices = range(1, max(1, min(16, rows // 512)) + 1)
    return next((parts for parts in choices if busy(parts) >= 0.9), max(choices, key=busy))
