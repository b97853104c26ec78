"""Ends a training that hangs: for a process that is gone or stuck, others would wait for ever."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from datetime import timedelta

from torch import distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from llavakit import TrainingError
from llavakit.contracts.run import ProcessGroup

WAITING = "computing"
"""What a process does while it may wait for the others."""
_MOST_SECONDS = 10.0  # between two signs of life


def is_of_lost_process(error: BaseException | None) -> bool:
    """Say whether an error means that another process is gone."""
    by_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return by_gloo or isinstance(error, dist.DistError)


class Watch:
    """Tells the others what this process is at, and ends it when that does not change.

    `minutes` is the longest time between two `beat`s. Then the process that is behind is named, and
    this one ends with exit code 2, so that torchrun ends or restarts all of them. Nothing is
    watched where there is one process.
    """

    def __init__(self, process_group: ProcessGroup, minutes: float) -> None:
        self._rank, self._size = process_group.rank, process_group.size
        self._limit = minutes * 60
        self._pause = min(_MOST_SECONDS, self._limit / 10)
        self._now: tuple[int, str] = (0, WAITING)
        self._at = time.monotonic()
        self._count = 0  # of the signs that it gave
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if self._size > 1:
            # torchrun's own, or that of rank 0: a connection for this thread alone
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, timeout=timedelta(seconds=60))
            run = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get(
                "TORCHELASTIC_RESTART_COUNT", "0"
            )
            self._store: Store = PrefixStore(f"llavakit/{run}", store)
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if is_of_lost_process(error):
            step = self._now[0]
            reason = " ".join(str(error).split())
            raise TrainingError(
                f"rank {self._rank} lost another process in step {step} ({reason:.200}); what "
                "happened is in that one's output. --resume goes on from the last checkpoint"
            ) from error

    def beat(self, step: int, what: str = WAITING) -> None:
        """Say that this process goes on: with which step, and what it does."""
        self._now, self._at = (step, what), time.monotonic()

    def _look(self) -> None:
        while not self._ended.wait(self._pause):
            stuck = time.monotonic() - self._at > self._limit
            try:
                self._sign()
                if stuck:
                    self._end()
            except RuntimeError:  # the store went with its process: torchrun ends this one, too
                if stuck:
                    os._exit(2)

    def _sign(self) -> None:
        self._count += 1
        self._store.set(str(self._rank), json.dumps([self._count, *self._now]))

    def _wait(self, pauses: int) -> None:
        """Wait, and go on giving signs: the others look for them now, too."""
        for _ in range(2 * pauses):
            time.sleep(self._pause / 2)
            self._sign()

    def _end(self) -> None:
        """Name who is behind, and leave."""
        before = self._signs()
        self._wait(3)
        if time.monotonic() - self._at < self._limit:
            return
        after = self._signs()
        silent = [rank for rank, sign in after.items() if sign[0] == before[rank][0]]
        silent = [rank for rank in silent if rank != self._rank]
        behind = [rank for rank in after if rank in silent or after[rank][2] != WAITING]
        step = self._now[0]
        says = next(rank for rank in after if rank not in silent)
        if self._rank != says:  # one says it for all, unless it is slow to
            self._wait(5)
        named = "; ".join(
            f"rank {rank}, last seen {after[rank][2]} in step {after[rank][1]},"
            + (" gives no sign of life" if rank in silent else " does not go on")
            for rank in behind
        )
        print(
            f"error: no process has gone on from step {step} for {self._limit / 60:g} minutes: "
            f"{named or 'all are in it, and wait for each other'}. Look at that process's machine "
            "and output; --resume goes on from the last checkpoint (option `timeout`)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # the main thread waits within a message to the others

    def _signs(self) -> dict[int, tuple[int, int, str]]:
        """Return of each rank how often it gave a sign, its step, and what it does."""
        found: dict[int, tuple[int, int, str]] = {}
        for rank in range(self._size):
            known = self._store.check([str(rank)])
            found[rank] = (0, 0, "at the start")
            if known:
                count, step, what = json.loads(self._store.get(str(rank)))
                found[rank] = (count, step, what)
        return found
