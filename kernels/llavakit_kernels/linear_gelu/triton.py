# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""linear_gelu in one launch: product, bias and GELU; forward, and backward with recomputation."""

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

FORWARD, FORWARD_AND_SAVE, BACKWARD = 0, 1, 2


@triton.jit
def _store_gelu(
    out,
    before,
    grad,
    values,
    bias,
    row,
    column,
    N,
    H,
    grad_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MODE: tl.constexpr,
):
    at_row = row + tl.arange(0, HEIGHT)
    at_column = column + tl.arange(0, WIDTH)
    inside = at_column < H
    mask = (at_row < N)[:, None] & inside[None, :]
    rows = at_row.to(tl.int64)[:, None]  # row times width passes 2^31 at long streams
    columns = at_column[None, :]
    if HAS_BIAS:
        values += tl.load(bias + at_column, mask=inside, other=0.0).to(tl.float32)[None, :]
    # gelu(x) = x * share with share = (1 + erf(x / sqrt 2)) / 2; its slope is
    # share + x * exp(-x^2 / 2) / sqrt(2 pi)
    share = 0.5 + 0.5 * tl.erf(values * 0.7071067811865476)
    if MODE == 2:
        slope = share + values * 0.3989422804014327 * tl.exp(-0.5 * values * values)
        above = tl.load(grad + rows * grad_stride + columns, mask=mask, other=0.0)
        tl.store(
            out + rows * H + columns,
            (slope * above.to(tl.float32)).to(out.dtype.element_ty),
            mask=mask,
        )
    else:
        tl.store(out + rows * H + columns, (values * share).to(out.dtype.element_ty), mask=mask)
    if MODE == 1:
        tl.store(before + rows * H + columns, values.to(before.dtype.element_ty), mask=mask)


@triton.jit
def _store_pieces(
    out,
    before,
    grad,
    values,
    bias,
    row,
    column,
    N,
    H,
    grad_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MODE: tl.constexpr,
):
    if PIECES > 1:
        # stored in pieces (see launch.py)
        HALF: tl.constexpr = WIDTH // 2
        one, two = halves(values, HEIGHT, WIDTH)
        _store_pieces(
            out, before, grad, one, bias, row, column, N, H, grad_stride,
            HEIGHT, HALF, PIECES // 2, HAS_BIAS, MODE,
        )  # fmt: skip
        _store_pieces(
            out, before, grad, two, bias, row, column + HALF, N, H, grad_stride,
            HEIGHT, HALF, PIECES // 2, HAS_BIAS, MODE,
        )  # fmt: skip
    else:
        _store_gelu(
            out, before, grad, values, bias, row, column, N, H, grad_stride,
            HEIGHT, WIDTH, HAS_BIAS, MODE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "size_class"])
def gelu_kernel(
    left,
    right,
    bias,
    grad,
    out,
    before,
    N,
    E,
    D,
    left_stride,
    right_stride,
    grad_stride,
    size_class,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    PIECES: tl.constexpr,
    PER_SM: tl.constexpr,
):
    """MODE 0: out = gelu(left @ right.T + bias). MODE 1: also stores gelu's argument in `before`.
    MODE 2: out = grad * gelu's slope. E is the layer's width, called H in the public function."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_n = tl.cdiv(E, BLOCK_N)
    stored = program - programs
    for tile in tl.range(program, tiles_m * tiles_n, programs, flatten=FLATTEN):
        m, n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(D, BLOCK_K)):
            k = step * BLOCK_K
            a = load_tile(left, m * BLOCK_M, k, N, D, left_stride, BLOCK_M, BLOCK_K, TMA)
            b = load_tile(right, n * BLOCK_N, k, E, D, right_stride, BLOCK_N, BLOCK_K, TMA)
            sums = multiply(a, b.T, sums, PRECISION)

        # counted apart from the loop's number, or FLATTEN has no effect (see project_splice)
        stored += programs
        m, n = tile_at(stored, tiles_m, tiles_n, GROUP_M)
        row, column = m * BLOCK_M, n * BLOCK_N
        _store_pieces(
            out, before, grad, sums, bias, row, column, N, E, grad_stride,
            BLOCK_M, BLOCK_N, PIECES, HAS_BIAS, MODE,
        )  # fmt: skip


def forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    save: bool,
    *,
    out: Tensor | None = None,
    config: triton.Config | None = None,
    tma: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the activations [N, H], and GELU's argument: [N, H] with save, else [0]."""
    N, H = features.shape[0], weight.shape[0]
    before = features.new_empty((N, H) if save else (0,))
    mode = FORWARD_AND_SAVE if save else FORWARD
    return _run(features, weight, bias, None, before, mode, out, config, tma), before


def before_grad(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor | None = None,
    config: triton.Config | None = None,
    tma: bool = True,
) -> Tensor:
    """Return the gradient by GELU's argument, [N, H]; the product is computed again."""
    return _run(features, weight, bias, rows_contiguous(grad), None, BACKWARD, out, config, tma)


def _run(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    before: Tensor | None,
    mode: int,
    out: Tensor | None,
    config: triton.Config | None,
    tma: bool,
) -> Tensor:
    (N, D), H = features.shape, weight.shape[0]
    if out is None:
        out = torch.empty(N, H, dtype=features.dtype, device=features.device)
    if out.numel() == 0:  # a grid of no programs cannot be launched
        return out
    left, right = rows_contiguous(features), rows_contiguous(weight)
    tma = tma and takes_descriptor(left) and takes_descriptor(right)
    units = processors(out.device)

    def grid(meta: Mapping[str, int]) -> tuple[int, ...]:
        tiles = triton.cdiv(N, meta["BLOCK_M"]) * triton.cdiv(H, meta["BLOCK_N"])
        return (min(units * meta["PER_SM"], tiles),)

    arguments = {
        "left": descriptor(left) if tma else left,
        "right": descriptor(right) if tma else right,
        "bias": bias if bias is None else bias.contiguous(),
        "grad": grad,
        "out": out,
        "before": before,
        "N": N,
        "E": H,
        "D": D,
        "left_stride": left.stride(0),
        "right_stride": right.stride(0),
        "grad_stride": 0 if grad is None else grad.stride(0),
        "size_class": size_class(N),  # tuned for few, some and many rows, not for each N
        "TMA": tma,
        "HAS_BIAS": bias is not None,
        "MODE": mode,
        "PRECISION": precision(left),
    }
    launch(gelu_kernel, grid, arguments, left, config, tiles="gelu")
    return out
