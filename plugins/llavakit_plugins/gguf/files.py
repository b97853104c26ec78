"""One GGUF file: written tensor by tensor, so that no second copy of a model is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type, quants

from llavakit import ModelError, explain_write

_TYPES = {"f32": Type.F32, "f16": Type.F16, "q8_0": Type.Q8_0}
_FILES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_ALWAYS_WHOLE = ("position_embd", "class_embd")  # small, and added to what is float32
_NEVER_BLOCKS = ("patch_embd",)  # a convolution, which llama.cpp has in f16 and f32 alone
_BLOCK = 32


def write_file(
    path: Path,
    architecture: str,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    describe: Callable[[gguf.GGUFWriter], None],
) -> dict[str, float]:
    """Write a file, read it back, and return the largest error of each type.

    `kind` is the type of matrices: `f32`, `f16` or `q8_0`. `describe` writes the metadata.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    describe(writer)
    writer.add_file_type(_FILES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = {name: _type_of(name, tensor.shape, kind) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape, of = tuple(tensor.shape), types[name]
        if of is Type.Q8_0:
            stored = quants.quant_shape_to_byte_shape(shape, of)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), of)
        else:
            number = np.dtype(np.float16 if of is Type.F16 else np.float32)
            size = int(np.prod(shape)) * number.itemsize
            writer.add_tensor_info(name, shape, number, size)
    with explain_write(path):
        # header and table of tensors first:
        # GGUF has the offsets of all tensors in front of their data
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(_stored(name, _numbers(tensor), types[name]))
        writer.close()
    return _read_back(path, tensors)


def _type_of(name: str, shape: tuple[int, ...], kind: str) -> Type:
    """Return the type of a tensor: vectors stay whole, and so does what has no whole blocks."""
    if len(shape) < 2 or any(part in name for part in _ALWAYS_WHOLE):
        return Type.F32
    of = _TYPES[kind]
    if of is Type.Q8_0 and (shape[-1] % _BLOCK or any(part in name for part in _NEVER_BLOCKS)):
        return Type.F16
    return of


def _numbers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def _stored(name: str, numbers: np.ndarray[Any, Any], of: Type) -> np.ndarray[Any, Any]:
    if of is Type.F32:
        return numbers
    if of is Type.F16 and np.abs(numbers).max(initial=0) > np.finfo(np.float16).max:
        raise ModelError(f"{name} holds numbers that float16 does not: use type=f32 or q8_0")
    stored: np.ndarray[Any, Any] = (
        numbers.astype(np.float16) if of is Type.F16 else quants.quantize(numbers, of)
    )
    return stored


def _read_back(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest error of each type. Raises ModelError beyond the type's rounding."""
    largest: dict[str, float] = {}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    if set(found) != set(tensors):
        raise ModelError(f"{path.name} does not hold what was written; report this")
    for name, tensor in tensors.items():
        read, expected = found[name], _numbers(tensor)
        of = Type(read.tensor_type)
        values = quants.dequantize(read.data, of).reshape(expected.shape)
        apart = float(np.abs(values - expected).max(initial=0))
        most = float(np.abs(expected).max(initial=0))
        # half the distance of neighbours: 2**-11 of a number; 1/254 of a block's largest, and what
        # its factor is off by, of float16 itself
        allowed = {
            Type.F32: 0.0,
            Type.F16: most * 2**-11 + 2**-25,
            Type.Q8_0: most * (1 / 254 + 2**-10),
        }[of]
        if not apart <= allowed:  # not a number, too
            raise ModelError(f"{name} of {path.name} is off by {apart:.3g}; report this")
        largest[of.name.lower()] = max(apart, largest.get(of.name.lower(), 0.0))
    return largest
