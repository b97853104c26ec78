"""The tracker `csv`: metrics.csv in the run's folder, one number a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from llavakit import explain_write
from llavakit_plugins.trackers.series import SeriesTracker, Start, TrackerOptions

_COLUMNS = ("step", "at", "name", "value")


class CsvFile(SeriesTracker):
    """Appends `step,at,name,value`; a resumed run says again what it does again, the last counts.

    `at` is the number of optimisation steps, empty for what a finished step reports.
    """

    name = "csv"
    Options = TrackerOptions

    def __init__(self, options: TrackerOptions) -> None:
        super().__init__(options)
        self._path = Path()

    def start(self, start: Start) -> None:
        self._path = start.folder / "metrics.csv"
        with explain_write(self._path), self._path.open("a+b") as file:
            file.seek(0)
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
            file.truncate(whole)  # without half a line, which a kill or a full disk leaves
        if not whole:
            self._write([_COLUMNS])

    def numbers(self, step: str, at: int, numbers: Mapping[str, float]) -> None:
        self._write([(step, str(at), name, repr(value)) for name, value in numbers.items()])

    def results(self, step: str, numbers: Mapping[str, float]) -> None:
        self._write([(step, "", name, repr(value)) for name, value in numbers.items()])

    def _write(self, rows: list[tuple[str, ...]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        # opened for each write: what is written is there for others to read, and after a kill
        with explain_write(self._path), self._path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
