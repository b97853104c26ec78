"""A report of its own: the tracker `ledger` writes what each step took, from the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit import Options, Tracker, hookimpl


class Ledger(Tracker):
    """One line for each step that is done."""

    name = "ledger"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._run = Path()

    def begin(self, directory: Path) -> None:
        self._run = directory
        assert (directory / "recipe.toml").is_file()

    def record(self, event: Mapping[str, Any]) -> None:
        if event["event"] in ("done", "kept", "taken"):
            done = json.loads((self._run / event["step"] / "artifact.json").read_text())
            with (self._run / "ledger.txt").open("a") as file:
                file.write(f"{event['step']} {event['event']} {done['seconds']}\n")


@hookimpl
def llava_trackers() -> list[type[Tracker]]:
    return [Ledger]
