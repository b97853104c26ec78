"""How far a step is, with the time left: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.progress import TimeElapsedColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0


@contextmanager
def show_progress(label: str, stream: TextIO = sys.stderr) -> Iterator[Display]:
    """Yield the display of one step; it ends with the block."""
    if stream.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=Console(file=stream)) as bars:
            yield Display(label, stream, bars)
    else:
        yield Display(label, stream, None)


class Display:
    """Shows one step's progress; call it as often as you like."""

    def __init__(self, label: str, stream: TextIO, bars: Bars | None) -> None:
        self._label, self._stream, self._bars = label, stream, bars
        self._task = bars.add_task(label, total=None, note="") if bars else None
        self._total = -1
        self._begun = self._shown = time.monotonic()
        self._first = 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if total != self._total:  # another phase of the step
            self._total, self._begun, self._first, self._shown = total, now, done, now
            if self._bars and self._task is not None:
                self._bars.reset(self._task, total=total, completed=done, note=note)
            return
        if self._bars and self._task is not None:
            self._bars.update(self._task, completed=done, note=note)
        elif done >= total or now - self._shown >= _PLAIN_SECONDS:
            self._shown = now
            line = f"{self._label}: {done}/{total}{self._left(done, now)}"
            print(f"{line}  {note}".rstrip(), file=self._stream, flush=True)

    def _left(self, done: int, now: float) -> str:
        fresh = done - self._first
        if done >= self._total or fresh <= 0:
            return ""
        return f", {duration((now - self._begun) / fresh * (self._total - done))} left"


def duration(seconds: float) -> str:
    """Return seconds as people say them: `45 s`, `3 min 20 s`, `4.5 h`."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
