"""The tracker `report`: writes report.html and report.md anew after every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit import Options, Tracker, write_text
from llavakit_plugins.reporting.run_folder import StepRecord, read_record

_FINISHED = ("done", "kept", "taken")


class Report(Tracker):
    """Shows what a run did and what came of it. Reads the run's folder only."""

    name = "report"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._directory = Path()
        self._records: list[StepRecord] = []

    def begin(self, directory: Path) -> None:
        self._directory = directory

    def record(self, event: Mapping[str, Any]) -> None:
        if event["event"] in _FINISHED:
            self._records.append(read_record(self._directory / event["step"]))
            write_report(self._directory, self._records)


def write_report(directory: Path, records: Sequence[StepRecord]) -> None:
    """Write report.html and report.md of the steps that are done.

    Raises LlavaError where they cannot be written. An image that is missing, damaged or outside of
    `directory` leaves a note in its place.
    """
    from llavakit_plugins.reporting.page import page
    from llavakit_plugins.reporting.pictures import Pictures
    from llavakit_plugins.reporting.summary import collect
    from llavakit_plugins.reporting.text import lines

    summary = collect(directory, records)
    pictures = Pictures(directory)
    write_text(directory / "report.html", page(summary, pictures))
    write_text(directory / "report.md", "\n".join(lines(summary, pictures)) + "\n")
