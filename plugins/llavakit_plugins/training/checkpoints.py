"""Checkpoints of a training step: safetensors and JSON, whole or not there, the last few kept.

Those of divided weights lie in one file a process, which `sharded_checkpoints` writes and reads.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from llavakit import HASHED_BYTES, TrainingError, digest, new_folder

_TENSORS = "state.safetensors"
_STATE = "state.json"
_DAMAGES = (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError)

StateT = TypeVar("StateT")


def load_whole(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that one process wrote."""
    return load_file(folder / _TENSORS)


class Checkpoints:
    """The checkpoints below one folder, named by their step."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def folder_of(self, step: int) -> Path:
        """Return where the checkpoint of a step lies."""
        return self.folder / f"step-{step:06}"

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint; then drop the oldest beyond `keep`."""
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with new_folder(self.folder_of(step)) as partial:
            save_file(whole, partial / _TENSORS)
            self.describe(partial, step, state)
        self.drop_old()

    def describe(self, folder: Path, step: int, state: Mapping[str, Any]) -> None:
        """Write what makes tensors that lie in `folder` the checkpoint of a step."""
        check = f"{_tensors_check(folder)} {_sum(state)}"
        found = {"step": step, "check": check, "state": dict(state)}
        (folder / _STATE).write_text(json.dumps(found), encoding="utf-8")

    def drop_old(self) -> None:
        """Drop the oldest checkpoints beyond `keep`; call it after a new one is whole."""
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)

    def load(
        self, kind: type[StateT], read: Callable[[Path], dict[str, Tensor]] = load_whole
    ) -> tuple[dict[str, Tensor], StateT] | None:
        """Return the newest checkpoint's tensors and its state as `kind`; None where there is none.

        `read` reads the tensors of a checkpoint that several processes wrote. Raises TrainingError
        where the newest checkpoint is damaged.
        """
        found = self._all()
        if not found:
            return None
        newest = found[-1]
        try:
            saved = json.loads((newest / _STATE).read_text(encoding="utf-8"))
            if saved["step"] != _number(newest):
                raise ValueError(f"it is that of step {saved['step']!r:.20}")
            tensors_check = _tensors_check(newest)
            # checkpoints of before 2026-12 have a check of their tensors alone
            if saved["check"] not in (tensors_check, f"{tensors_check} {_sum(saved['state'])}"):
                raise ValueError(f"{_STATE} or a file beside it is not what was written")
            state = TypeAdapter(kind).validate_python(saved["state"])
            tensors = (load_whole if (newest / _TENSORS).exists() else read)(newest)
        except _DAMAGES as error:
            raise TrainingError(
                f"checkpoint {newest} is damaged ({error}); remove it to go on from the one "
                "before, or from the step's start"
            ) from error
        return tensors, state

    def _all(self) -> list[Path]:
        return sorted(_numbered(self.folder, "step"), key=_number)


class Best:
    """The trained weights of the step that did best so far, in the checkpoints' folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, weights: Mapping[str, Tensor], *, main: bool = True) -> None:
        """Keep the weights of `step`, beside those of an earlier step.

        With several processes all must call it; the `main` one writes.
        """
        with new_folder(self._folder_of(step)) if main else nullcontext() as partial:
            write_whole(weights, None if partial is None else partial / _TENSORS)
            if partial is not None:
                check = {"step": step, "check": _fingerprint(partial / _TENSORS)}
                (partial / _STATE).write_text(json.dumps(check), encoding="utf-8")

    def recall(self, step: int) -> dict[str, Tensor]:
        """Return the weights of `step`. Raises TrainingError where they are damaged."""
        path = self._folder_of(step) / _TENSORS
        try:
            check = path.with_name(_STATE)
            if check.exists():  # not in folders of before 2026-12
                saved = json.loads(check.read_text(encoding="utf-8"))
                if saved["check"] != _fingerprint(path):
                    raise ValueError("it is not what was written")
            return load_file(path)
        except _DAMAGES as error:
            raise TrainingError(
                f"{path}, the best weights of this step, is damaged ({error}); remove the "
                "step's folder and run again"
            ) from error

    def drop_all_but(self, step: int) -> None:
        """Remove what was the best before `step`."""
        for old in _numbered(self.folder, "best"):
            if old != self._folder_of(step):
                shutil.rmtree(old)

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"best-{step:06}"


_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
}  # fmt: skip
"""How safetensors names the types of weights."""


def write_whole(tensors: Mapping[str, Tensor], path: Path | None) -> None:
    """Write tensors, divided or not, as safetensors; no more than one is whole at a time.

    With several processes all must call it; those without a `path` only send their shares.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        offsets = {"data_offsets": [begin, end]}
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), **offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors in the mapped file are aligned
    with path.open("wb") if path is not None else nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if file is not None:
                own = full.detach().cpu().contiguous().flatten()
                file.write(own.view(torch.uint8).numpy().data)


def _tensors_check(folder: Path) -> str:
    """Return what changes with the files of a checkpoint's tensors."""
    whole = folder / _TENSORS
    if whole.exists():
        return _fingerprint(whole)
    files = sorted(folder.glob("*.safetensors"))
    return sha256(
        "".join(f"{file.name} {_fingerprint(file)} " for file in files).encode()
    ).hexdigest()


def _numbered(folder: Path, what: str) -> list[Path]:
    """Return the folders that we wrote; a copy that somebody made beside them is not ours."""
    return [path for path in folder.glob(f"{what}-*") if _number(path) >= 0 and path.is_dir()]


def _number(path: Path) -> int:
    found = re.fullmatch(r"[a-z]+-([0-9]{6,18})", path.name)
    return int(found[1]) if found else -1


def _sum(state: Any) -> str:
    return sha256(json.dumps(state).encode()).hexdigest()


def _fingerprint(path: Path) -> str:
    """Return the size of a file, and its hash where that takes seconds at most."""
    size = path.stat().st_size
    return f"{size} {digest(path)}" if size <= HASHED_BYTES else f"{size}"
