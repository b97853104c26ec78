"""Checks of the operators' arguments, and the choice of an implementation."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton", "onednn"]
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require(condition: bool, sentence: str) -> None:
    """Raise ValueError with `sentence`, which names argument and remedy, unless `condition`."""
    if not condition:
        raise ValueError(sentence)


def require_shape(name: str, tensor: Tensor, letters: str, *sizes: int | None) -> None:
    """Raise ValueError unless `tensor` has these sizes; None allows any size.

    `letters` names the dimensions in the message.
    """
    shape = tensor.shape
    fits = len(shape) == len(sizes)
    for have, size in zip(shape, sizes, strict=False):
        fits = fits and (size is None or have == size)
    if not fits:
        wanted = ", ".join(
            letter if size is None else f"{letter}={size}"
            for letter, size in zip(letters, sizes, strict=True)
        )
        raise ValueError(f"`{name}` must be [{wanted}], but its shape is {tuple(shape)}")


def require_indices(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` holds int64 or int32."""
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"`{name}` must hold int64 or int32 indices, but is {tensor.dtype}: call .long() on it"
        )


def require_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first one."""
    unlike = _unlike_the_first(tensors, lambda tensor: tensor.device)
    if unlike is not None:
        first, device, name, other = unlike
        raise ValueError(f"`{name}` is on {other} but `{first}` on {device}: move one of them")


def require_same_dtype(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors have the floating dtype of the first one."""
    name, anchor = next((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    if not anchor.is_floating_point():
        raise ValueError(f"`{name}` must be floating point, but is {anchor.dtype}")
    unlike = _unlike_the_first(tensors, lambda tensor: tensor.dtype)
    if unlike is not None:
        first, dtype, name, other = unlike
        raise ValueError(
            f"`{name}` is {other} but `{first}` is {dtype}: cast one of them, "
            "or run under torch.autocast"
        )


def _unlike_the_first(
    tensors: dict[str, Tensor | None], value_of: Callable[[Tensor], object]
) -> tuple[str, object, str, object] | None:
    """Return the name and the value of the first, and of one with another value; None without."""
    first, wanted = "", None
    for name, tensor in tensors.items():
        found = wanted if tensor is None else value_of(tensor)
        if wanted is None:
            first, wanted = name, found
        elif found != wanted:
            return first, wanted, name, found
    return None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products under the caller's torch.autocast; None without it."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):  # which knows no meta
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast for an operator's own products: their dtypes are decided
    before."""
    if autocast_dtype(device) is not None:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def choose(impl: str, *tensors: Tensor) -> Literal["reference", "triton"]:
    """Return the implementation for these tensors: `impl`, or for "auto" the kernels if they fit.

    "onednn" is the reference with the products of `llavakit_kernels.onednn`.
    Raises ValueError if impl="triton" cannot serve the tensors.
    """
    if impl in ("reference", "onednn"):
        return "reference"
    if impl not in ("auto", "triton"):
        raise ValueError(
            f'`impl` must be "auto", "reference", "triton" or "onednn", but is {impl!r}'
        )
    # In Triton's interpreter a kernel is thousands of times slower: only on request.
    if impl == "auto" and not tensors[0].is_cuda:
        return "reference"
    reason = _no_triton(tensors)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f'impl="triton" cannot serve here: {reason}; use impl="auto"')
    return "reference"


def _no_triton(tensors: tuple[Tensor, ...]) -> str | None:
    """Return the reason why the kernels cannot serve these tensors, or None if they can."""
    device = tensors[0].device
    if not _triton_installed():
        return "triton is not installed"
    if any(tensor.dtype not in KERNEL_DTYPES for tensor in tensors):
        return "the kernels take bfloat16, float16 and float32"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {device}, and the kernels need an NVIDIA GPU"
    if _capability(device.index) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
