"""A bar with the time left, for terminals that can move their cursor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from llavakit import Progress, duration, one_line
from llavakit_plugins.reporting.values import count

Clock = Callable[[], float]


def rich_bar(label: str, stream: TextIO, clock: Clock) -> AbstractContextManager[Progress] | None:
    """Return the bar; None where the terminal cannot move its cursor (`TERM=dumb`)."""
    console = Console(file=stream)
    return _shown(label, console, clock) if console.is_interactive else None


@contextmanager
def _shown(label: str, console: Console, clock: Clock) -> Iterator[Progress]:
    with _bars(console, clock) as bars:
        yield _Bar(label, bars)


class _Bar:
    def __init__(self, label: str, bars: Bars) -> None:
        self._label, self._bars = label, bars
        self._done, self._total = 0, 0
        self._task = self._begin(done=0, total=0)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        # another phase: a new task, as rich would estimate its time from the speed of the last one
        if total != self._total or done < self._done:
            self._bars.remove_task(self._task)
            self._task = self._begin(done, total)
        self._done, self._total = done, total
        at = count(done, total)
        self._bars.update(self._task, completed=done, count=at, note=one_line(note))

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
