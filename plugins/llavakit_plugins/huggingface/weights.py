"""Reads weight files of other projects: safetensors and pickles, whole or in shards, on access.

Nothing is trusted: a pickle is read as tensors only, a shard must lie in the folder itself, and
damaged or missing files are named before a model is made from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llavakit import ModelError
from llavakit_plugins.huggingface.json_files import read_json

STEMS = ("model", "pytorch_model")
"""How transformers names the files of a model's weights, without their suffix."""
_SUFFIXES = (".safetensors", ".bin")
_GARBLED = ("Unsupported operand", "invalid load key", "truncated", "Ran out of input")
"""What torch says of bytes that are no pickle, as against one that it will not run."""


@dataclass(frozen=True)
class Weights(Mapping[str, Tensor]):
    """Tensors by name. Files are memory-mapped, so a tensor costs memory only when it is used.

    With a `dtype`, each tensor is read and converted separately: a mapped file would stay in memory
    beside all converted tensors.
    """

    home: Path
    """The folder or file they come from, for errors."""
    files: Mapping[str, Path]
    """The file of each tensor."""
    dtype: torch.dtype | None = None
    """That of all floating-point tensors; as in the file where None."""
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def within(cls, folder: Path, dtype: torch.dtype | None = None) -> Weights | None:
        """Return a model's weights, or None where the folder has none.

        Raises ModelError where a file is damaged or a shard is missing.
        """
        for stem in STEMS:  # safetensors first: no pickle is opened where there is a choice
            for suffix in _SUFFIXES:
                whole = folder / f"{stem}{suffix}"
                index = folder / f"{stem}{suffix}.index.json"
                if whole.is_file():
                    return cls.of_file(whole, dtype)
                if index.is_file():
                    return cls._of_index(index, dtype)
        return None

    @classmethod
    def of_file(cls, path: Path, dtype: torch.dtype | None = None) -> Weights:
        """Return the tensors of one file."""
        opened = _read(path, dtype)
        return cls(path, dict.fromkeys(opened.keys(), path), dtype, {path: opened})

    @classmethod
    def _of_index(cls, index: Path, dtype: torch.dtype | None) -> Weights:
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise ModelError(f"{index} has no `weight_map` of names; copy the checkpoint again")
        opened: dict[Path, Any] = {}
        for name in sorted(set(table.values())):
            shard = index.parent / name
            if shard.parent != index.parent:  # an index is foreign input: no path leaves its folder
                raise ModelError(f"{index} names {name}, which is outside its folder; refused")
            if not shard.is_file():
                raise ModelError(
                    f"{index.parent} lacks {name}, which {index.name} names; copy the whole folder"
                )
            opened[shard] = _read(shard, dtype)
        for key, name in table.items():
            if key not in opened[index.parent / name].keys():  # noqa: SIM118  (a file, no dict)
                raise ModelError(
                    f"{index.parent / name} lacks {key}, which {index.name} says is there; copy "
                    "the checkpoint again"
                )
        files = {key: index.parent / name for key, name in table.items()}
        return cls(index.parent, files, dtype, opened)

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        opened = self._open[path]
        if isinstance(opened, dict):
            tensor: Tensor = opened[name]
            return tensor
        try:
            mapped: Tensor = opened.get_tensor(name)
            if not _differs(mapped, self.dtype):
                return mapped
            # a mapped page would stay beside its copy
            with safe_open(path, framework="pt", backend="pread") as unmapped:
                own: Tensor = unmapped.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path} cannot be read: {error}; copy it again") from error
        return own.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _differs(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    return dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype


def _read(path: Path, dtype: torch.dtype | None) -> Any:
    """Return an open safetensors file, or the tensors of a pickle in `dtype`."""
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged or cut short ({error}); copy it again") from error
    # mapping needs the format that torch has written since 1.6
    tensors = _unpickle(path, mapped=is_zipfile(path))
    if not any(_differs(tensor, dtype) for tensor in tensors.values()):
        return tensors
    tensors = _unpickle(path, mapped=False)
    for name in list(tensors):  # each goes as its copy comes
        if _differs(tensors[name], dtype):
            tensors[name] = tensors[name].to(dtype)
    return tensors


def _unpickle(path: Path, *, mapped: bool) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        if any(sign in str(error) for sign in _GARBLED):
            raise ModelError(f"{path} is damaged or no file of torch's; copy it again") from error
        raise ModelError(
            f"{path} is a pickle that holds more than tensors, which may run code when it is "
            "opened, so it is refused; get the weights as safetensors, or from a source you trust "
            "and convert them there"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{path} is damaged or cut short ({reason}); copy it again") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModelError(f"{path} holds no tensors by name; give a checkpoint's weights")
    return found
