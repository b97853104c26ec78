"""Columns of numbers in one safetensors file, mapped into the memory that all processes share.

A column whose name ends in `_ends` counts up: where each text or list ends among all of them. So
columns of several files become one by adding what came before.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from llavakit import new_file

Column = npt.NDArray[Any]

_DTYPES = {"I64": "<i8", "U64": "<u8", "I32": "<i4", "F32": "<f4", "I16": "<i2", "U8": "|u1"}
_NAMES = {np.dtype(kind): name for name, kind in _DTYPES.items()}
_LONGEST_HEADER = 1 << 26


class Columns:
    """Columns by name, and what is known of them; those of a file are mapped and read-only."""

    def __init__(
        self, columns: Mapping[str, Column], facts: Mapping[str, Any], path: Path | None = None
    ) -> None:
        self.facts, self.path = dict(facts), path
        self._columns = dict(columns)

    @classmethod
    def open(cls, path: Path) -> Columns:
        """Map a file that `write_columns` wrote.

        Raises ValueError where it is damaged, OSError where it cannot be read.
        """
        with path.open("rb") as file:
            try:
                header, begin = _header(file)
                facts = json.loads(header.pop("__metadata__")["facts"])
                size = os.fstat(file.fileno()).st_size
                found, end = {}, 0
                mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
                for name, entry in header.items():
                    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
                    count = math.prod(shape)
                    if entry["data_offsets"] != [end, end + count * dtype.itemsize]:
                        raise ValueError(f"`{name}` does not lie where it should")
                    if min(shape, default=0) < 0 or begin + end + count * dtype.itemsize > size:
                        raise ValueError("it is cut short")
                    flat = np.frombuffer(mapped, dtype, count, begin + end) if count else ()
                    found[name] = np.asarray(flat, dtype).reshape(shape)
                    end += count * dtype.itemsize
                if begin + end != size:
                    raise ValueError("it is longer than what it lists")
            except (KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"its header is damaged ({error!r})") from error
        return cls(found, facts, path)

    def __getitem__(self, name: str) -> Column:
        return self._columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __reduce__(self) -> tuple[Any, ...]:
        # a process that does not share our memory maps the file, too
        if self.path is not None:
            return Columns.open, (self.path,)
        return Columns, (self._columns, self.facts)


class Stored(Sequence[Columns]):
    """Files of columns, each opened where it is looked at: a process may not hold thousands."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Columns: ...
    @overload
    def __getitem__(self, index: slice) -> Stored: ...
    def __getitem__(self, index: int | slice) -> Columns | Stored:
        paths = self._paths[index]
        return Columns.open(paths) if isinstance(paths, Path) else Stored(paths)


def joined(parts: Sequence[Columns], facts: Mapping[str, Any]) -> Columns:
    """Return the columns of all parts, one behind the other, in memory."""
    names = list(parts[0])
    return Columns({name: np.concatenate([*_pieces(parts, name)]) for name in names}, facts)


def write_columns(path: Path, parts: Sequence[Columns], facts: Mapping[str, Any]) -> None:
    """Write the columns of all parts, one behind the other, whole or not at all.

    No more than one column of one part is in memory at a time. Raises LlavaError where it cannot
    be written.
    """
    # the widest first, so that all are aligned in the mapped file
    kinds = parts[0]
    names = sorted(kinds, key=lambda name: -kinds[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {"facts": json.dumps(facts)}}
    end = 0
    for name in names:
        first = kinds[name]
        rows = sum(len(part[name]) for part in parts)
        begin, end = end, end + rows * math.prod(first.shape[1:]) * first.itemsize
        entry = {"dtype": _NAMES[first.dtype], "shape": [rows, *first.shape[1:]]}
        header[name] = {**entry, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # written, not mapped: a full disk would end a process that writes to mapped memory
    with new_file(path, binary=True) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in _pieces(parts, name):
                file.write(np.ascontiguousarray(piece).data.cast("B") if piece.size else b"")


def _pieces(parts: Sequence[Columns], name: str) -> Iterator[Column]:
    total = 0
    for part in parts:
        column = part[name]
        if name.endswith("_ends"):
            column = column + total
            total = int(column[-1]) if len(column) else total
        yield column


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its data begins."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= _LONGEST_HEADER:
        raise ValueError("its header is damaged")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, 8 + length
