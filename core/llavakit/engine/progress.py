"""How far a step is, with the time left: plain lines, or what a plugin shows on a terminal.

A display for terminals is what the entry point `terminal` of the group `llavakit.displays` names:
it is called with the label, the stream and the clock, and returns a context manager that yields a
`Progress`, or None for a terminal that it cannot serve.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import entry_points
from typing import TextIO

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
    with ExitStack() as stack:
        display = _terminal(one_line(label), stream, clock)
        if display is not None:
            yield stack.enter_context(display)
        else:
            lines = _Lines(label, stream, clock)
            stack.callback(lines.close)
            yield lines


def _terminal(label: str, stream: TextIO, clock: Clock) -> AbstractContextManager[Progress] | None:
    displays = entry_points(group="llavakit.displays", name="terminal") if stream.isatty() else ()
    shown = (display.load()(label, stream, clock) for display in displays)
    return next((display for display in shown if display is not None), None)


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


class _Lines:
    """Says something at the first call, then now and then, and what was said last at the end."""

    def __init__(self, label: str, stream: TextIO, clock: Clock) -> None:
        self._label, self._stream, self._clock = one_line(label), stream, clock
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
        at = count(self._done, self._total)
        line = f"{self._label}: {at}{time_left}  {one_line(self._note)}".rstrip()
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)
        self._shown, self._news = now, False


def count(done: int, total: int) -> str:
    return f"{done}/{total}" if total > 0 else f"{done}"


def say(text: str) -> None:
    """Say something of a run that is no progress, at once, on stderr."""
    print(shown(text), file=sys.stderr, flush=True)


def one_line(text: str) -> str:
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
