"""Who is named when no process goes on."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from llavakit_plugins.training.watch import Watch


@pytest.mark.parametrize("late", [0, 1, 2])
def test_those_that_look_who_is_behind_are_not_taken_for_gone(
    late: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are stuck at once, rank 2 reading samples; one looks a little later than the others."""

    def leave(_: int) -> NoReturn:
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    store = PrefixStore("watch", HashStore())
    groups: list[Any] = [SimpleNamespace(rank=rank, size=3) for rank in range(3)]
    watches = [Watch(group, minutes=0.4 / 60) for group in groups]
    for rank, watch in enumerate(watches):
        watch._store = store
        watch.beat(6, *(["reading samples"] if rank == 2 else []))
        watch._sign()
    time.sleep(0.45)

    def look(rank: int) -> None:
        time.sleep(0.05 * (rank == late))
        with pytest.raises(SystemExit):
            watches[rank]._end()

    threads = [threading.Thread(target=look, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert said
    for line in said:
        assert "minutes: rank 2, last seen reading samples in step 6, does not go on. " in line
