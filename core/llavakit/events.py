"""events.jsonl: one line for everything that happens in a run, in order."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llavakit.files import explain_write
from llavakit.interfaces import Tracker

FILE = "events.jsonl"

_log = logging.getLogger("llavakit")


class EventLog:
    """Appends events to a file and shows them to the recipe's trackers."""

    def __init__(self, folder: Path, trackers: Sequence[Tracker] = ()) -> None:
        path = folder / FILE
        with explain_write(path):
            _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8")
        self._trackers = list(trackers)
        self._step = ""

    def enter(self, step: str) -> None:
        """Name the step that the next events belong to."""
        self._step = step

    def __call__(self, name: str, /, **values: Any) -> None:
        event = {"time": round(time.time(), 3), "step": self._step, "event": name, **values}
        with explain_write(Path(self._file.name)):
            self._file.write(json.dumps(_plain(event), ensure_ascii=False) + "\n")
            self._file.flush()
        for tracker in list(self._trackers):
            with self._watching(tracker):
                tracker.record(event)

    def close(self) -> None:
        """Close the file and the trackers."""
        try:
            with explain_write(Path(self._file.name)):
                self._file.close()
        finally:
            for tracker in list(self._trackers):
                with self._watching(tracker):
                    tracker.close()

    @contextmanager
    def _watching(self, tracker: Tracker) -> Iterator[None]:
        """Let a tracker that fails observe no more: what it observes must not end with it."""
        try:
            yield
        except Exception:
            self._trackers.remove(tracker)
            _log.warning(
                "tracker `%s` failed; it sees nothing more of this run, which goes on",
                tracker.name, exc_info=True,
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


def _drop_torn_line(path: Path) -> None:
    """Cut the half line that a killed run may have left."""
    if path.is_file():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)


def read_events(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the events of a run."""
    path = folder / FILE
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)
