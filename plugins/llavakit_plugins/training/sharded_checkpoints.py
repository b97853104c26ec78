"""Checkpoints of divided weights: every process writes its share, while training goes on.

They are safetensors, written and read by torch.distributed.checkpoint, so that another number of
processes, or one alone, reads what it needs of them. No pickle is written or opened.
"""

from __future__ import annotations

import json
import math
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from llavakit import LlavaError, TrainingError, new_folder
from llavakit.contracts.run import ProcessGroup
from llavakit_plugins.training.agreement import in_main
from llavakit_plugins.training.checkpoints import Checkpoints
from llavakit_plugins.training.watch import is_of_lost_process

Place = Callable[[str, torch.Size, torch.dtype], Tensor]
"""Returns the tensor, whole or divided, to read that of this name, shape and dtype into."""


class ShardedCheckpoints:
    """Saves in the background; at most one save at a time is under way.

    A checkpoint appears under its name when all shares are written and complete, so a kill before
    that leaves the one before as the newest.
    """

    def __init__(self, checkpoints: Checkpoints, process_group: ProcessGroup) -> None:
        self._checkpoints, self._process_group = checkpoints, process_group
        # of its own: messages of a save must not mix with those of training
        self._group: Any = dist.new_group(backend="gloo")
        self._saving: Future[Any] | None = None
        self._step = 0
        self._committed = threading.Event()
        self._problem: BaseException | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        then: Callable[[], None],
    ) -> None:
        """Begin to save; all processes must call it. `then` is called in the main one at the end.

        Returns when the tensors are copied to the CPU, so training may change them at once. Raises
        what went wrong with the save before.
        """
        self.finish()
        self._step = step
        whole, group = ExitStack(), self._process_group
        folder = self._checkpoints.folder_of(step)
        # the others wait until the folder is there
        made = in_main(group, lambda: str(whole.enter_context(new_folder(folder))))
        partial = group.broadcast(made or "")
        written = json.loads(json.dumps(dict(state)))  # training goes on to change it
        # a single number has no place in a slice of a file
        found = {name: t.reshape(1) if t.ndim == 0 else t for name, t in tensors.items()}
        writer = HuggingFaceStorageWriter(partial, save_distributed=True)
        saving = async_save(found, storage_writer=writer, process_group=self._group)
        assert isinstance(saving, Future)
        self._saving = saving
        if not self._process_group.is_main:
            return
        self._committed.clear()

        def commit(done: Future[Any]) -> None:
            try:
                with whole:
                    done.result()
                    _refuse_gaps(Path(partial))
                    self._checkpoints.describe(Path(partial), step, written)
                self._checkpoints.drop_old()
                then()
            except BaseException as error:
                self._problem = error
            finally:
                self._committed.set()

        saving.add_done_callback(commit)

    def finish(self) -> None:
        """Wait for the save under way. Raises LlavaError if it failed."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        problem = saving.exception()
        if self._process_group.is_main:
            self._committed.wait()
            problem, self._problem = self._problem, None
        if problem is None:
            return
        if isinstance(problem, LlavaError):
            raise problem
        if isinstance(problem, CheckpointException):
            problem = next((error for error, _ in problem.failures.values()), problem)
        if is_of_lost_process(problem):
            raise problem  # the watch says so
        reason = " ".join(str(problem).split())
        raise TrainingError(
            f"the checkpoint of step {self._step} cannot be written: {reason:.300}; free space, or "
            "write to a folder that all processes share, and go on with --resume"
        ) from problem


def _metadata(folder: Path) -> Any:
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def _refuse_gaps(folder: Path) -> None:
    """Raise TrainingError where a process wrote elsewhere: to its machine's own disk, say."""
    for name, found in _metadata(folder).items():
        if sum(math.prod(chunk.sizes) for chunk in found.chunks) != math.prod(found.size):
            raise TrainingError(
                f"a share of `{name}` is missing in {folder.parent}; write the run to a folder "
                "that all machines share (--out)"
            )


def read_shares(folder: Path, place: Place) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, each read into what `place` returns for it.

    With several processes all must call it; each reads what it holds of them alone.
    """
    found = {
        name: place(name, entry.size, entry.properties.dtype)
        for name, entry in _metadata(folder).items()
    }
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of reading alone, which is what is meant
        load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    return found
