"""Ctrl-C and SIGTERM: a run stops where it can go on from."""

from __future__ import annotations

import signal
from collections.abc import Iterator
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

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs us handles signals
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
