"""events.jsonl: one line for everything that happens in a run, in order."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llavakit.contracts.errors import LlavaError
from llavakit.contracts.interfaces import Tracker
from llavakit.files import JsonLines
from llavakit.recipe.redaction import redacted

FILE = "events.jsonl"

_log = logging.getLogger("llavakit")


class EventLog:
    """Appends events to a file and shows them to the recipe's trackers."""

    def __init__(self, folder: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._lines = JsonLines(folder / FILE)
        self._trackers = list(trackers)  # those that have not failed
        self.step = ""  #: The step that the next events belong to.
        for tracker in trackers:
            with self._watching(tracker):
                tracker.begin(folder)

    def __call__(self, name: str, /, **values: Any) -> None:
        given = {"time": round(time.time(), 3), "step": self.step, "event": name, **values}
        event = redacted(given)
        self._lines.append([_plain(event)], durable=False)  # a training does not wait for the disk
        for tracker in list(self._trackers):
            with self._watching(tracker):
                tracker.record(event)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in list(self._trackers):
            with self._watching(tracker):
                tracker.close()

    @contextmanager
    def _watching(self, tracker: Tracker) -> Iterator[None]:
        """Let a tracker that fails observe no more: what it observes must not end with it."""
        try:
            yield
        except Exception as error:
            self._trackers.remove(tracker)
            known = isinstance(error, LlavaError)  # a sentence of ours, such as of a full disk
            _log.warning(
                "tracker `%s` failed%s; it sees nothing more of this run, which goes on",
                tracker.name, f" ({error})" if known else "", exc_info=not known,
            )  # fmt: skip


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, so that any reader can read on."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
