"""Checkpoints of a training step: safetensors and JSON, whole or not there, the last few kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit import HASHED_BYTES, TrainingError, digest, new_folder

_TENSORS = "state.safetensors"
_STATE = "state.json"
_DAMAGES = (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError)

StateT = TypeVar("StateT")


class Checkpoints:
    """The checkpoints below one folder, named by their step."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint; then drop the oldest beyond `keep`."""
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with new_folder(self.folder / f"step-{step:06}") as partial:
            save_file(whole, partial / _TENSORS)
            check = f"{_fingerprint(partial / _TENSORS)} {_sum(state)}"
            found = {"step": step, "check": check, "state": dict(state)}
            (partial / _STATE).write_text(json.dumps(found), encoding="utf-8")
        for old in self._all()[: -self.keep]:  # after the new one is whole
            shutil.rmtree(old)

    def load(self, kind: type[StateT]) -> tuple[dict[str, Tensor], StateT] | None:
        """Return the newest checkpoint's tensors and its state as `kind`; None where there is none.

        Raises TrainingError where the newest checkpoint is damaged.
        """
        found = self._all()
        if not found:
            return None
        newest = found[-1]
        try:
            saved = json.loads((newest / _STATE).read_text(encoding="utf-8"))
            if saved["step"] != _number(newest):
                raise ValueError(f"it is that of step {saved['step']!r:.20}")
            tensors_check = _fingerprint(newest / _TENSORS)
            # checkpoints of before 2026-12 have a check of their tensors alone
            if saved["check"] not in (tensors_check, f"{tensors_check} {_sum(saved['state'])}"):
                raise ValueError(f"{_TENSORS} or {_STATE} is not what was written")
            tensors = load_file(newest / _TENSORS)
            state = TypeAdapter(kind).validate_python(saved["state"])
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

    def save(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights of `step`, beside those of an earlier step."""
        with new_folder(self._folder_of(step)) as partial:
            whole = {name: weight.cpu().contiguous() for name, weight in weights.items()}
            save_file(whole, partial / _TENSORS)
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
