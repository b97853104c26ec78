# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""The forward pass of project_splice in one launch: product, scatter of its rows, gather of text.

A persistent grid first works on the tiles of the product. In the last round some programs get no
tile; these begin with the text rows, so that all programs end at about the same time.
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
)
from llavakit_kernels.tiles import halves, load_tile, multiply, tile_at

# 16 rows of 1024 columns are 32 KB in flight per program, enough to hide the memory's latency.
TEXT_ROWS, TEXT_COLUMNS = 16, 1024


@triton.jit
def _store_visual(
    out,
    values,
    bias,
    rows,
    valid,
    column,
    E,
    out_stride,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    at_column = column + tl.arange(0, WIDTH)
    inside = at_column < E
    if HAS_BIAS:
        values += tl.load(bias + at_column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + rows[:, None] * out_stride + at_column[None, :],
        values.to(out.dtype.element_ty),
        mask=valid[:, None] & inside[None, :],
    )


@triton.jit
def _copy_text(
    token_ids,
    embedding,
    sources,
    out,
    block,
    T,
    V,
    E,
    embedding_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = block * ROWS + tl.arange(0, ROWS)
    text = tl.load(sources + at, mask=at < T, other=0) < 0
    # an image fills hundreds of rows in sequence: most blocks within it have no text to copy
    if tl.max(text.to(tl.int32), 0) > 0:
        ids = tl.load(token_ids + at, mask=text, other=0).to(tl.int64)
        # An id outside of the vocabulary reads no memory, and its row becomes NaN, which is seen.
        known = text & (ids >= 0) & (ids < V)
        rows = at.to(tl.int64)
        for column in tl.range(0, E, COLUMNS):
            at_column = column + tl.arange(0, COLUMNS)
            inside = at_column < E
            values = tl.load(
                embedding + ids[:, None] * embedding_stride + at_column[None, :],
                mask=known[:, None] & inside[None, :],
                other=float("nan"),
            )
            tl.store(
                out + rows[:, None] * out_stride + at_column[None, :],
                values,
                mask=text[:, None] & inside[None, :],
            )


@triton.jit(do_not_specialize=["N", "T", "V", "size_class"])
def forward_kernel(
    left,
    right,
    bias,
    token_ids,
    embedding,
    visual_rows,
    sources,
    out,
    N,
    T,
    V,
    E,
    D,
    left_stride,
    right_stride,
    embedding_stride,
    out_stride,
    size_class,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    PIECES: tl.constexpr,
    PER_SM: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_n = tl.cdiv(E, BLOCK_N)
    tiles = tiles_m * tiles_n
    # The epilogue counts tiles by itself. If it used the loop's number, the store of one tile would
    # depend on the loads of the next, and the flattening would have no effect.
    stored = program - programs
    for tile in tl.range(program, tiles, programs, flatten=FLATTEN):
        m, n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(D, BLOCK_K)):
            k = step * BLOCK_K
            a = load_tile(left, m * BLOCK_M, k, N, D, left_stride, BLOCK_M, BLOCK_K, TMA)
            b = load_tile(right, n * BLOCK_N, k, E, D, right_stride, BLOCK_N, BLOCK_K, TMA)
            sums = multiply(a, b.T, sums, PRECISION)

        stored += programs
        m, n = tile_at(stored, tiles_m, tiles_n, GROUP_M)
        at = m * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = tl.load(visual_rows + at, mask=at < N, other=-1).to(tl.int64)
        valid = (rows >= 0) & (rows < T)
        column = n * BLOCK_N
        if PIECES == 2:
            HALF: tl.constexpr = BLOCK_N // 2
            one, two = halves(sums, BLOCK_M, BLOCK_N)
            _store_visual(out, one, bias, rows, valid, column, E, out_stride, HALF, HAS_BIAS)
            column += HALF
            _store_visual(out, two, bias, rows, valid, column, E, out_stride, HALF, HAS_BIAS)
        else:
            _store_visual(out, sums, bias, rows, valid, column, E, out_stride, BLOCK_N, HAS_BIAS)

    # text blocks begin at the program behind the one with the last tile
    first = (program - tiles % programs + programs) % programs
    for block in range(first, tl.cdiv(T, ROWS), programs):
        _copy_text(
            token_ids,
            embedding,
            sources,
            out,
            block,
            T,
            V,
            E,
            embedding_stride,
            out_stride,
            ROWS,
            COLUMNS,
        )


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
    config: triton.Config | None = None,
    tma: bool = True,
) -> Tensor:
    """Return the stream [T, E]; arguments as in project_splice, already checked.

    out: write to this tensor; config, tma: use these instead of what would be chosen.
    """
    (N, D), (V, E), T = features.shape, embedding.shape, token_ids.shape[0]
    if out is None:
        out = torch.empty(T, E, dtype=embedding.dtype, device=embedding.device)
    if T == 0 or E == 0:
        return out
    left, right = rows_contiguous(features), rows_contiguous(weight)
    embedding = rows_contiguous(embedding)
    tma = tma and takes_descriptor(left) and takes_descriptor(right)
    units = processors(out.device)

    def grid(meta: Mapping[str, int]) -> tuple[int, ...]:
        tiles = triton.cdiv(N, meta["BLOCK_M"]) * triton.cdiv(E, meta["BLOCK_N"])
        return (min(units * meta["PER_SM"], tiles + triton.cdiv(T, TEXT_ROWS)),)

    arguments = {
        "left": descriptor(left) if tma else left,
        "right": descriptor(right) if tma else right,
        "bias": bias if bias is None else bias.contiguous(),
        "token_ids": token_ids.contiguous(),
        "embedding": embedding,
        "visual_rows": visual_rows.contiguous(),
        "sources": sources.contiguous(),
        "out": out,
        "N": N,
        "T": T,
        "V": V,
        "E": E,
        "D": D,
        "left_stride": left.stride(0),
        "right_stride": right.stride(0),
        "embedding_stride": embedding.stride(0),
        "out_stride": out.stride(0),
        "size_class": size_class(N),
        "TMA": tma,
        "HAS_BIAS": bias is not None,
        "PRECISION": precision(left),
        "ROWS": TEXT_ROWS,
        "COLUMNS": min(TEXT_COLUMNS, triton.next_power_of_2(E)),
    }
    launch(forward_kernel, grid, arguments, left, config)
    return out
