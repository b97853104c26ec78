"""How far a step is, with the time left: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from llavakit.contracts.run import Progress
from llavakit.recipe.redaction import redact, shown

_LINE_SECONDS = 10.0  # between plain lines, at least
_PHASE_SECONDS = 1.0  # before a line at a phase's begin or end, at least
_QUIET_SECONDS = 3.0  # before what is usually quick is shown

Clock = Callable[[], float]


@contextmanager
def show_progress(
    label: str, stream: TextIO | None = None, clock: Clock = time.monotonic
) -> Iterator[Progress]:
    """Yield the display of one step, by default on stderr; it ends with the block."""
    stream = stream or sys.stderr
    if stream.isatty() and (console := Console(file=stream)).is_interactive:
        with _bars(console, clock) as bars:
            yield _Bar(label, bars)
    else:
        lines = _Lines(label, stream, clock)
        try:
            yield lines
        finally:
            lines.close()


@contextmanager
def show_if_slow(
    label: str, stream: TextIO | None = None, clock: Clock = time.monotonic
) -> Iterator[Progress]:
    """Yield a display that shows nothing unless it is still called after a few seconds."""
    begun = clock()
    shown: list[Progress] = []
    with ExitStack() as stack:

        def progress(done: int, total: int, note: str = "") -> None:
            if not shown and clock() - begun >= _QUIET_SECONDS:
                shown.append(stack.enter_context(show_progress(label, stream, clock)))
            for display in shown:
                display(done, total, note)

        yield progress


# -- on a terminal ---------------------------------------------------------------------------------


class _Bar:
    def __init__(self, label: str, bars: Bars) -> None:
        self._label, self._bars = _printable(label), bars
        self._done, self._total = 0, 0
        self._task = self._begin(done=0, total=0)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if total != self._total or done < self._done:
            self._bars.remove_task(self._task)
            self._task = self._begin(done, total)
        self._done, self._total = done, total
        count = _count(done, total)
        self._bars.update(self._task, completed=done, count=count, note=_printable(note))

    def _begin(self, done: int, total: int) -> TaskID:
        known = total if total > 0 else None
        return self._bars.add_task(self._label, total=known, completed=done, count="0", note="")


class _Left(ProgressColumn):
    """The time left; once done, the time it took; before either is known, the time so far."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(duration(task.finished_time or 0.0), "green")
        if task.time_remaining is not None:
            return Text(f"{duration(task.time_remaining)} left", "cyan")
        return Text(duration(int(task.elapsed or 0)), "dim")


def _bars(console: Console, clock: Clock) -> Bars:
    # the note takes the room that is left over; where there is none, the bar gives way
    note = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Bars(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24, table_column=Column(min_width=4)),
        TextColumn("{task.fields[count]}", style="", table_column=Column(no_wrap=True)),
        _Left(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=note),
        console=console,
        get_time=clock,
        refresh_per_second=5,
        expand=True,
    )


# -- elsewhere -------------------------------------------------------------------------------------


class _Lines:
    """Says something at the first call, then now and then, and what was said last at the end."""

    def __init__(self, label: str, stream: TextIO, clock: Clock) -> None:
        self._label, self._stream, self._clock = _printable(label), stream, clock
        self._total, self._done, self._note = -1, -1, ""
        self._first, self._begun = 0, clock()  # of a phase
        self._shown: float | None = None  # when the last line was written
        self._news = False  # since then

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = self._clock()
        begins = total != self._total or done < self._done
        if begins:
            self._first, self._begun = done, now
        ends = done == total != self._done
        self._total, self._done, self._note, self._news = total, done, note, True
        pause = _PHASE_SECONDS if begins or ends else _LINE_SECONDS
        if self._shown is None or now - self._shown >= pause:
            self._write(now)

    def close(self) -> None:
        """Write what was not."""
        if self._news:
            self._write(self._clock())

    def _write(self, now: float) -> None:
        fresh, left = self._done - self._first, self._total - self._done
        time_left = ""
        if left > 0 and fresh > 0:
            time_left = f", {duration((now - self._begun) / fresh * left)} left"
        count = _count(self._done, self._total)
        line = f"{self._label}: {count}{time_left}  {_printable(self._note)}".rstrip()
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)
        self._shown, self._news = now, False


def _count(done: int, total: int) -> str:
    return f"{done}/{total}" if total > 0 else f"{done}"


def say(text: str) -> None:
    """Say something of a run that is no progress, at once, on stderr."""
    print(shown(text), file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """Return a text as one line without control codes."""
    return " ".join("".join(c if c.isprintable() else " " for c in redact(text)).split())


def duration(seconds: float) -> str:
    """Return seconds as people say them: `45 s`, `3 min 20 s`, `4.5 h`."""
    if seconds < 1:
        return f"{seconds:.2g} s" if seconds >= 0.01 else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Return the rows as lines, their columns two spaces apart; `right` says how each is aligned.

    A row may be shorter than others.
    """
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(right))]
    return [
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=False)
        ).rstrip()
        for row in rows
    ]
