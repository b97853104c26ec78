"""Arrays in one file, written in pieces and mapped into memory that processes share.

The format is that of safetensors: the length of a JSON table, the table, the arrays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llavakit import explain_write, sync

_DTYPES = {"I64": np.int64, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class Pieces(NamedTuple):
    """An array that is written piece by piece, along its first axis."""

    dtype: npt.DTypeLike
    shape: tuple[int, ...]
    pieces: Iterable[npt.NDArray[Any]]


def write_arrays(path: Path, arrays: Mapping[str, Pieces], metadata: Mapping[str, str]) -> None:
    """Write arrays to a file, whole or not at all. Those of 8 bytes an item come first."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, _) in arrays.items():
        begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        table[name] = {
            "dtype": _NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    partial = path.with_name(f".{path.name}.{token_hex(4)}.partial")
    with explain_write(path):
        try:
            with partial.open("wb") as file:
                file.write(len(head).to_bytes(8, "little") + head)
                for dtype, _, pieces in arrays.values():
                    for piece in pieces:
                        file.write(np.ascontiguousarray(piece, dtype).data)
                assert file.tell() == 8 + len(head) + end
            sync(partial)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def map_arrays(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Return the arrays of a file, mapped, and its metadata. Raises OSError or ValueError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("it has no table")
        table = json.loads(file.read(length))
    metadata = table.pop("__metadata__", {})
    found = {}
    for name, entry in table.items():
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ValueError("it is cut short")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        found[name] = (
            np.memmap(path, dtype, "r", 8 + length + begin, shape)
            if end > begin  # what is empty cannot be mapped
            else np.zeros(shape, dtype)
        )
    return found, metadata
