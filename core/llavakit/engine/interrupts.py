"""Ctrl-C and SIGTERM: a run stops where it can go on from, at once before it has begun."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llavakit.contracts.run import ProcessGroup, Stopping
from llavakit.engine.progress import say


@contextmanager
def interrupts(process_group: ProcessGroup) -> Iterator[Stopping]:
    """Yield a function that says whether Ctrl-C or SIGTERM came; a second one ends at once.

    In several processes both come, from the terminal and from torchrun, which ends them in time.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and process_group.size == 1:
            raise KeyboardInterrupt
        if not asked and process_group.is_main:
            again = "" if process_group.size > 1 else " (once more to stop at once)"
            say(f"stopping at the next safe point{again}")
        asked.append(number)

    with _handled(ask, signal.SIGINT, signal.SIGTERM):
        yield lambda: bool(asked)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process on the spot, with exit code 130, while nothing is at stake.

    Raised as an exception it may come within the import of a library that catches everything.
    """

    def end(number: int, frame: FrameType | None) -> None:
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        os._exit(130)

    with _handled(end, signal.SIGINT):
        yield


@contextmanager
def _handled(by: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    try:
        before = {number: signal.signal(number, by) for number in numbers}
    except ValueError:  # not in the main thread: whoever runs us handles signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
