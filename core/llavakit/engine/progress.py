"""How far a step is, with the time left, as a plugin shows it.

A display is what an entry point `terminal` of the group `llavakit.displays` names: it is called
with the label, the stream and the clock, and returns a context manager that yields a `Progress`, or
None for a stream that it cannot serve.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TextIO

from llavakit.contracts.run import Progress
from llavakit.recipe.redaction import redact, shown
from llavakit.registry.entry_points import entry_points, imported

_QUIET_SECONDS = 3.0  # before what is usually quick is shown

Clock = Callable[[], float]


@contextmanager
def show_progress(
    label: str, stream: TextIO | None = None, clock: Clock = time.monotonic
) -> Iterator[Progress]:
    """Yield the display of one step, by default on stderr; it ends with the block."""
    displays = entry_points(group="llavakit.displays", name="terminal")
    shown = (imported(found)(one_line(label), stream or sys.stderr, clock) for found in displays)
    display = next((display for display in shown if display is not None), None)
    with nullcontext(lambda *_, **__: None) if display is None else display as progress:
        yield progress


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
    return f"{seconds / 3600:.1f} h" if whole < 48 * 3600 else f"{seconds / 86400:.1f} days"
