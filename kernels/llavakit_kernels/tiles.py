# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Functions that the matrix kernels share: order of tiles, loads of tiles and rows, products."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter stores bfloat16 as integers, and its dot would multiply these integers.
_UPCAST = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def tile_at(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the row and column of a tile, where groups of GROUP_M rows are walked by columns.

    Programs that run at the same time then share few rows and few columns, which stay in L2.
    """
    per_group = GROUP_M * tiles_n
    group = tile // per_group
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    row = first + (tile % per_group) % height
    column = (tile % per_group) // height
    return row, column


@triton.jit
def load_tile(
    source,
    row,
    column,
    rows,
    columns,
    stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Return source[row : row + HEIGHT, column : column + WIDTH], zero outside of [rows, columns].

    With TMA, `source` is a tensor descriptor; without, a pointer to rows `stride` elements apart.
    """
    if TMA:
        tile = source.load([row, column])
    else:
        at_row = row + tl.arange(0, HEIGHT)
        at_column = column + tl.arange(0, WIDTH)
        tile = tl.load(
            source + at_row.to(tl.int64)[:, None] * stride + at_column[None, :],
            mask=(at_row < rows)[:, None] & (at_column < columns)[None, :],
            other=0.0,
        )
    return tile


@triton.jit
def load_rows(source, index, valid, column, columns, stride, WIDTH: tl.constexpr):
    """Return source[index, column : column + WIDTH], zero where `valid` is false.

    `index` must be int64: a row number times the stride can exceed 2^31.
    """
    at_column = column + tl.arange(0, WIDTH)
    return tl.load(
        source + index[:, None] * stride + at_column[None, :],
        mask=valid[:, None] & (at_column < columns)[None, :],
        other=0.0,
    )


@triton.jit
def multiply(a, b, sums, PRECISION: tl.constexpr):
    """Return sums + a @ b in float32; `a` is cast to the dtype of `b`."""
    a = a.to(b.dtype)
    if _UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def halves(tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return the left and the right half of a tile [HEIGHT, WIDTH]."""
    return tl.split(tl.permute(tl.reshape(tile, (HEIGHT, 2, WIDTH // 2)), (0, 2, 1)))
