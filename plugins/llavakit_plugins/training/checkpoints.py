"""Checkpoints of a training step: safetensors and JSON, whole or not there, the last few kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit import HASHED_BYTES, TrainingError, digest, new_folder

_TENSORS = "state.safetensors"
_STATE = "state.json"


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
            found = {"step": step, "check": _fingerprint(partial / _TENSORS), "state": dict(state)}
            (partial / _STATE).write_text(json.dumps(found), encoding="utf-8")
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest checkpoint's tensors and state; None where there is none.

        Raises TrainingError where the newest checkpoint is damaged.
        """
        found = self._all()
        if not found:
            return None
        newest = found[-1]
        try:
            saved = json.loads((newest / _STATE).read_text(encoding="utf-8"))
            if saved["check"] != _fingerprint(newest / _TENSORS):
                raise ValueError(f"{_TENSORS} is not what was written")
            tensors = load_file(newest / _TENSORS)
            state: dict[str, Any] = saved["state"]
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise TrainingError(
                f"checkpoint {newest} is damaged ({error}); remove it to go on from the one "
                "before, or from the step's start"
            ) from error
        return tensors, state

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name[5:]))


class Best:
    """The trained weights of the step that did best so far, in the checkpoints' folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights of `step`, beside those of an earlier step."""
        with new_folder(self._place(step)) as partial:
            whole = {name: weight.cpu().contiguous() for name, weight in weights.items()}
            save_file(whole, partial / _TENSORS)

    def recall(self, step: int) -> dict[str, Tensor]:
        """Return the weights of `step`. Raises TrainingError where they are damaged."""
        path = self._place(step) / _TENSORS
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{path}, the best weights of this step, is damaged ({error}); remove the "
                "step's folder and run again"
            ) from error

    def drop_all_but(self, step: int) -> None:
        """Remove what was the best before `step`."""
        for old in self.folder.glob("best-*"):
            if old != self._place(step):
                shutil.rmtree(old)

    def _place(self, step: int) -> Path:
        return self.folder / f"best-{step:06}"


def _fingerprint(path: Path) -> str:
    """Return the size of a file, and its hash where that takes seconds at most."""
    size = path.stat().st_size
    return f"{size} {digest(path)}" if size <= HASHED_BYTES else f"{size}"
