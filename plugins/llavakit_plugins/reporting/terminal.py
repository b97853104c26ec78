"""How far a step is: the display `terminal` of `llavakit.displays`.

Where there is no terminal, or a dumb one, plain lines are written now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

from llavakit import Progress, duration, one_line
from llavakit_plugins.reporting.values import count

_LINE_SECONDS = 10.0  # between plain lines, at least
_PHASE_SECONDS = 1.0  # before a line at a phase's begin or end, at least

Clock = Callable[[], float]


def bar(label: str, stream: TextIO, clock: Clock) -> AbstractContextManager[Progress]:
    """Return a bar, or lines where no cursor can be moved; it ends with the block."""
    if stream.isatty():
        # only here: it imports rich, which a log does not need
        from llavakit_plugins.reporting.bars import rich_bar

        if (found := rich_bar(label, stream, clock)) is not None:
            return found
    return _lines(label, stream, clock)


@contextmanager
def _lines(label: str, stream: TextIO, clock: Clock) -> Iterator[Progress]:
    lines = _Lines(label, stream, clock)
    try:
        yield lines
    finally:
        lines.close()


class _Lines:
    """Says something at the first call, then now and then, and what was said last at the end."""

    def __init__(self, label: str, stream: TextIO, clock: Clock) -> None:
        self._label, self._stream, self._clock = label, stream, clock
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
        # a log file may be in ASCII: a note with other characters must not end a training
        print(line.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)
        self._shown, self._news = now, False
