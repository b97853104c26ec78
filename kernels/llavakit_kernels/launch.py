"""Launches the matrix kernels: tile sizes for each chip, autotuning, TMA descriptors.

Tile sizes were chosen by compiling for sm_80 and sm_90 and reading registers, shared memory and
spills (tests/kernels/test_compiled.py). The fastest is measured at the first call with a size.
All tiles of one family have the same step along the inner dimension, so that a resumed run that
tunes differently still adds in the same order. Triton's warp specialisation is not used: on Hopper,
Triton 3.8 ignores it with eight warps and does not compile these tiles with four.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HOPPER_SHARED = 227 * 1024  # bytes for one program on Hopper and on data-centre Blackwell

# The block of each operand that can be read through a descriptor; all kernels use these names.
BLOCKS = {
    "left": ("BLOCK_M", "BLOCK_K"),
    "right": ("BLOCK_N", "BLOCK_K"),
    "right_inner": ("BLOCK_K", "BLOCK_N"),
}


def _set_descriptor_blocks(arguments: dict[str, Any]) -> None:
    """Set the descriptors' block shape to that of the configuration that is about to run."""
    for name, value in arguments.items():
        if isinstance(value, TensorDescriptor):
            height, width = BLOCKS[name]
            value.block_shape = [arguments[height], arguments[width]]


def tile(m: int, n: int, k: int, warps: int, stages: int, **more: int) -> triton.Config:
    """Return a configuration with output tile m x n and inner step k; FLATTEN, PIECES and PER_SM
    by name."""
    options = {"FLATTEN": 1, "PIECES": 1, "PER_SM": 1} | more
    return triton.Config(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8} | options,
        num_warps=warps,
        num_stages=stages,
        pre_hook=_set_descriptor_blocks,
    )


# FLATTEN loads the next tile's operands while the last tile is stored. PIECES is the number of
# parts in which a tile is stored; more parts need fewer registers and less shared memory. PER_SM
# programs on one multiprocessor hide each other's stores. Families: 16-bit operands by chip,
# float32 in tf32 or exactly.
PRODUCT_TILES: dict[str, list[triton.Config]] = {
    "hopper": [
        tile(128, 256, 64, 8, 3, PIECES=2),
        tile(128, 256, 64, 8, 4, PIECES=2),
        tile(128, 256, 64, 8, 4, PIECES=2, FLATTEN=0),
        tile(256, 128, 64, 8, 3, PIECES=2),
        tile(128, 128, 64, 4, 3, PER_SM=2),
    ],
    "ampere": [
        tile(128, 256, 32, 8, 3, FLATTEN=0),
        tile(128, 128, 64, 8, 3, FLATTEN=0),
        tile(128, 128, 32, 4, 4, FLATTEN=0, PER_SM=2),
        tile(64, 128, 32, 4, 3, FLATTEN=0, PER_SM=2),
    ],
    "tf32": [
        tile(128, 128, 32, 8, 3, FLATTEN=0),
        tile(64, 128, 32, 4, 3, FLATTEN=0, PER_SM=2),
    ],
    "float32": [
        tile(64, 64, 16, 4, 3, FLATTEN=0, PER_SM=2),
        tile(128, 64, 16, 8, 2, FLATTEN=0, PER_SM=2),
    ],
}
# GELU's polynomials need registers; two programs on a multiprocessor hide the time they take.
GELU_TILES: dict[str, list[triton.Config]] = {
    "hopper": [
        tile(128, 128, 64, 4, 3, PIECES=4, PER_SM=2),
        tile(128, 128, 64, 4, 3, PIECES=4, PER_SM=2, FLATTEN=0),
        tile(128, 256, 64, 8, 3, PIECES=4),
        tile(128, 256, 64, 8, 4, PIECES=4),
    ],
    "ampere": [
        tile(128, 128, 64, 8, 3, FLATTEN=0),
        tile(64, 128, 32, 4, 3, FLATTEN=0, PIECES=2, PER_SM=2),
    ],
    "tf32": [
        tile(128, 128, 32, 8, 3, FLATTEN=0, PIECES=2),
    ],
    "float32": [
        tile(64, 64, 16, 4, 3, FLATTEN=0, PIECES=2, PER_SM=2),
        tile(128, 64, 16, 8, 2, FLATTEN=0, PIECES=2, PER_SM=2),
    ],
}
TILES = {"product": PRODUCT_TILES, "gelu": GELU_TILES}
# The weight's gradient is not tuned: its column sums depend on the layout, so another choice would
# change the last bits. Half of its stages hold the row numbers that its loads wait for.
WEIGHT_GRAD_TILES = {
    "hopper": tile(128, 256, 64, 8, 5),
    "ampere": tile(128, 128, 32, 8, 5),
    "tf32": tile(128, 128, 32, 8, 5),
    "float32": tile(64, 64, 16, 4, 3),
}
# For the interpreter. All sizes differ, so that a wrong stride or mask shows in small tests.
SMALL = tile(32, 64, 32, 4, 1, PIECES=2)


def family(tensor: Tensor) -> str:
    """Return the family of tiles for products of tensors like this one."""
    if tensor.dtype == torch.float32:
        return "float32" if precision(tensor) == "ieee" else "tf32"
    chip = _properties(tensor.device)
    # Later consumer chips have no more shared memory than Ampere, so the Hopper tiles do not fit.
    roomy = chip.major >= 9 and chip.shared_memory_per_block_optin >= HOPPER_SHARED
    return "hopper" if roomy else "ampere"


def weight_grad_tile(tensor: Tensor) -> triton.Config:
    """Return the one configuration of the weight's gradient for tensors like this one."""
    return SMALL if INTERPRETED else WEIGHT_GRAD_TILES[family(tensor)]


def precision(tensor: Tensor) -> str:
    """Return `tf32` for float32 if torch.set_float32_matmul_precision allows it, else `ieee`."""
    exact = tensor.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def processors(device: torch.device) -> int:
    """Return the GPU's number of multiprocessors; a small odd number for the interpreter."""
    return 3 if INTERPRETED else int(_properties(device).multi_processor_count)


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def size_class(rows: int) -> int:
    """Return 0, 1 or 2 for few, some or many rows.

    Kernels are tuned once for each class and not for each micro-batch's own number of rows.
    """
    return 0 if rows <= 1024 else 1 if rows <= 8192 else 2


def takes_descriptor(tensor: Tensor) -> bool:
    """Return whether the tensor memory accelerator can read this matrix: it needs Hopper or newer,
    addresses and row strides in multiples of 16 bytes, and contiguous rows."""
    size = tensor.element_size()
    return (
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * size % 16 == 0
        and tensor.stride(1) == 1
        and (INTERPRETED or _properties(tensor.device).major >= 9)
    )


def descriptor(tensor: Tensor) -> TensorDescriptor:
    """Return a descriptor; the configuration sets its block shape before the launch."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 16])


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return the matrix itself if its rows are contiguous and do not overlap, else a copy."""
    fits = tensor.stride(-1) == 1 and tensor.stride(0) >= tensor.shape[-1]
    return tensor if fits else tensor.contiguous()


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    arguments: Mapping[str, Any],
    like: Tensor,
    config: triton.Config | None = None,
    tiles: str = "product",
) -> None:
    """Run a matrix kernel with its fastest configuration for products of tensors like `like`.

    config: run with this one; the interpreter's default is SMALL.
    """
    if config is None and INTERPRETED:
        config = SMALL
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        if config is None:
            tuned(kernel, tiles, family(like))[grid](**arguments)
            return
        config = for_kernel(config, kernel.arg_names)
        given = dict(arguments) | config.kwargs
        _set_descriptor_blocks(given)
        # The interpreter ignores the compiler's options.
        kernel[grid](**given, num_warps=config.num_warps, num_stages=config.num_stages)


@functools.cache
def tuned(kernel: Any, tiles: str, which: str) -> Any:
    """Return the kernel with Triton's autotuner, which measures once for each size."""
    names = kernel.arg_names
    configs = list(dict.fromkeys(for_kernel(config, names) for config in TILES[tiles][which]))
    key = [name for name in ("E", "D", "size_class", "TMA", "MODE") if name in names]
    return triton.autotune(configs=configs, key=key)(kernel)


def for_kernel(config: triton.Config, names: Sequence[str]) -> triton.Config:
    """Return the configuration without options that are not among a kernel's arguments."""
    return triton.Config(
        {name: value for name, value in config.kwargs.items() if name in names},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        pre_hook=config.pre_hook,
    )
