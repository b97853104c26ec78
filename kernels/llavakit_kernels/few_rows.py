"""Products of a few rows with a matrix on a CPU, as a step of decoding asks for them.

One row takes as long as reading the matrix does. MKL, by which PyTorch multiplies, reads it at half
of the memory's rate on AMD's CPUs, and always on one thread. numpy's `vecdot`, whose products of
vectors are OpenBLAS's, reads the same memory at nine tenths of it. Each output is the product of
two vectors, summed in the same order whatever is beside it: rows and threads change no bit.

Shapes: R rows, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit_kernels import onednn

__all__ = ["Linear", "OnednnLinear", "by_vectors", "faster_here", "linear", "multiply", "seen"]

_BY_VECTORS = 4  # rows; of more, oneDNN makes better use of what it has read
_FEW = 16
_LARGE = 512 << 10  # bytes of a matrix that are worth oneDNN's way there
_PIECE = 4 << 20  # bytes of a matrix that are worth waking a thread for


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    otherwise: Callable[..., Tensor] = F.linear,
) -> Tensor:
    """Return input @ weight.T + bias, [..., O]: of up to 4 rows by numpy, of up to 16 by oneDNN.

    input: [..., I]; weight: [O, I]; bias: [O] or None.

    More rows, more than 4 with a small matrix, and what is no plain float32 on a CPU or may need
    gradients, are left to `otherwise`.
    """
    # compilers first, which must not see the rest
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch.is_grad_enabled()
        or input.numel() > _FEW * weight.shape[-1]
        or not onednn.plain(input, weight, bias)
    ):
        return otherwise(input, weight, bias)
    rows = input.numel() // weight.shape[1]
    if rows > _BY_VECTORS and weight.nbytes >= _LARGE:
        return onednn.linear(input, weight, bias)
    if not (by_vectors(rows, weight.nbytes) and weight.is_contiguous()):
        return otherwise(input, weight, bias)
    with np.errstate(all="ignore"):
        output_RO = multiply(input.numpy().reshape(rows, -1), weight)
        if bias is not None:
            output_RO += seen(bias)
    return torch.from_numpy(output_RO).view(*input.shape[:-1], -1)


def by_vectors(rows: int, size: int = 0) -> bool:
    """Return whether so many rows are best multiplied by vectors with a matrix of `size` bytes.

    One row always is, which MKL computes on one thread. For several it has all of PyTorch's
    threads, and here a matrix occupies those that it is large enough for.
    """
    return rows == 1 or (rows <= _BY_VECTORS and torch.get_num_threads() <= 2 * _pieces(size))


def seen(weight: Tensor) -> np.ndarray:
    """Return an array on a weight's memory, which stays PyTorch's to free.

    `Tensor.numpy` would fix its storage's size for ever, and FSDP frees gathered weights by size 0.
    """
    return np.from_dlpack(weight.detach())


def multiply(input_RI: np.ndarray, weight: Tensor) -> np.ndarray:
    """Return input @ weight.T, [R, O]; the weight is a plain float32 matrix [O, I] on the CPU."""
    weight_OI, pieces = seen(weight), _pieces(weight.nbytes)
    input_RI = np.ascontiguousarray(input_RI)  # numbers with gaps are summed in another order
    # each row of the matrix meets all rows while a cache holds it
    if pieces == 1:
        output_OR = np.vecdot(weight_OI[:, None], input_RI[None])
    else:
        output_OR = _divided(input_RI, weight_OI, pieces)
    return np.ascontiguousarray(output_OR.T)


class Linear(nn.Linear):
    """nn.Linear with products of a few rows as here, and others as ever."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class OnednnLinear(onednn.Linear):
    """onednn.Linear with products of a few rows as here."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, onednn.linear)


@functools.cache
def faster_here() -> bool:
    """Return whether these products are faster than PyTorch's own, by what they are made of.

    They are where MKL meets a CPU of AMD, and numpy was built with OpenBLAS, as its wheels are.
    """
    if not (torch.backends.mkl.is_available() and hasattr(np, "vecdot")):
        return False
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"].get("name", "")
    return "openblas" in blas and "AuthenticAMD" in _processor()


def _processor() -> str:
    """Return a text that names the processor's vendor."""
    try:
        with open("/proc/cpuinfo") as file:
            return file.read(1024)  # of the first core, which comes again for each
    except OSError:
        return platform.processor()


def _pieces(size: int) -> int:
    return max(1, min(torch.get_num_threads(), size // _PIECE))


def _divided(input_RI: np.ndarray, weight_OI: np.ndarray, pieces: int) -> np.ndarray:
    """Return the product [O, R], computed in pieces by a thread each."""
    outputs = len(weight_OI)
    output_OR = np.empty((outputs, len(input_RI)), np.float32)

    def compute(piece: int) -> None:
        own = slice(outputs * piece // pieces, outputs * (piece + 1) // pieces)
        with np.errstate(all="ignore"):  # which is each thread's own
            np.vecdot(weight_OI[own, None], input_RI[None], out=output_OR[own])

    waiting = [_threads(os.getpid()).submit(compute, piece) for piece in range(1, pieces)]
    compute(0)
    for one in waiting:
        one.result()
    return output_OR


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process, which sleep while they are not needed: a fork has none."""
    return ThreadPoolExecutor(os.cpu_count(), "llavakit-rows")
