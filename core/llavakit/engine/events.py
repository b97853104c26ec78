"""events.jsonl: one line for everything that happens in a run, in order; and its trackers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from llavakit.contracts.errors import LlavaError
from llavakit.contracts.interfaces import Tracker
from llavakit.recipe.files import JsonLines
from llavakit.recipe.redaction import redacted

FILE = "events.jsonl"
TRACKER = "tracker "  #: Begins the name of a tracker's thread.
_MOST_WAITING = 4096  # events that a tracker may be behind
_MOMENT = 2.0  # seconds that it gets at the end of a step
_PATIENCE = 60.0  # seconds that a run waits at its end for a tracker that does not move

_log = logging.getLogger("llavakit")


class EventLog:
    """Appends events to a file and shows them to the recipe's trackers."""

    def __init__(self, folder: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._lines = JsonLines(folder / FILE)
        self._watchers = [_Watcher(tracker, folder) for tracker in trackers]
        self.step = ""  #: The step that the next events belong to.

    def __call__(self, name: str, /, **values: Any) -> None:
        given = {"time": round(time.time(), 3), "step": self.step, "event": name, **values}
        event = redacted(given)  # a copy: it stays as it is now
        self._lines.append([finite(event)], durable=False)  # a training does not wait for the disk
        for watcher in self._watchers:
            watcher.tell(deepcopy(event))  # its own: it may change it
            if name == "done":  # a report is there before the next step begins, which may fork
                watcher.settle()

    def close(self) -> None:
        """Close the trackers; one that hangs is left behind."""
        for watcher in self._watchers:
            watcher.ask_to_close()
        for watcher in self._watchers:
            watcher.wait()


class _Watcher(Thread):
    """A tracker on a thread of its own: where it hangs or fails, the run goes on without it."""

    def __init__(self, tracker: Tracker, folder: Path) -> None:
        super().__init__(name=f"{TRACKER}{tracker.name}", daemon=True)
        self._tracker = tracker
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._calls.put(partial(tracker.begin, folder))
        self._told, self._called = 1, 0
        self._hangs = self._misses = False
        self.start()

    def tell(self, event: Mapping[str, Any]) -> None:
        """Hand an event on, unless the tracker is too far behind."""
        if self.is_alive() and self._calls.qsize() < _MOST_WAITING:
            self._told += 1
            self._calls.put(partial(self._tracker.record, event))
        elif self.is_alive() and not self._misses:
            self._misses = True
            _log.warning("tracker `%s` hangs or is too slow; it misses events", self._tracker.name)

    def settle(self) -> None:
        """Give it a moment to catch up, unless it has had one in vain."""
        end = time.monotonic() + _MOMENT
        while self.is_alive() and self._called < self._told and not self._hangs:
            time.sleep(0.005)
            self._hangs = time.monotonic() > end

    def ask_to_close(self) -> None:
        self._calls.put(self._tracker.close)
        self._calls.put(None)

    def wait(self) -> None:
        """Wait for it to end, as long as it still does something."""
        seen = -1
        while self.is_alive() and seen != self._called:
            seen = self._called
            self.join(_PATIENCE)
        if self.is_alive():
            _log.warning("tracker `%s` hangs; the run ends without it", self._tracker.name)

    def run(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                call()
                self._called += 1
        except (Exception, SystemExit) as error:
            known = isinstance(error, LlavaError)  # a sentence of ours, such as of a full disk
            _log.warning(
                "tracker `%s` failed%s; it sees nothing more of this run, which goes on",
                self._tracker.name, f" ({error})" if known else "", exc_info=not known,
            )  # fmt: skip


def finite(value: Any) -> Any:
    """Return a value for JSON in UTF-8: no NaN and infinity (null), no half characters (U+FFFD)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
