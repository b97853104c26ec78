"""Why a checkpoint was not written: what the user can do about it hangs on that."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from llavakit import TrainingError
from llavakit_plugins.training.sharded_checkpoints import ShardedCheckpoints


def failed(error: Exception) -> ShardedCheckpoints:
    """Checkpoints of which the last save, of a process that is not the main one, went wrong."""
    saves = ShardedCheckpoints.__new__(ShardedCheckpoints)
    saving: Future[Any] = Future()
    saving.set_exception(error)
    saves._saving, saves._step = saving, 4
    saves._process_group = SimpleNamespace(is_main=False)  # type: ignore[assignment]
    return saves


def test_a_full_disk_is_said() -> None:
    with pytest.raises(TrainingError, match=r"step 4 cannot be written: .*No space.*free space"):
        failed(OSError(28, "No space left on device")).finish()


def test_a_process_that_is_gone_is_not_taken_for_a_full_disk() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")
    with pytest.raises(RuntimeError, match="Connection reset") as caught:
        failed(lost).finish()
    assert caught.value is lost  # the watch says so
