"""Records the batches that were submitted. The mark is written first, so a crash loses no batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self
from uuid import uuid4

from llavakit import DataError, JsonLines
from llavakit_plugins.generation.requests.ledger import Ledger


class Journal:
    """The marks under which batches were submitted, and the batches whose replies are collected."""

    def __init__(self, path: Path, earlier: list[Path]) -> None:
        self._lines = JsonLines(path)
        self.marks: list[str] = []
        self.collected: set[str] = set()
        for other in (*earlier, path):
            self._read(other)
        mine = [row["mark"] for row in _rows(path) if isinstance(row.get("mark"), str)]
        if not mine:
            mine = [uuid4().hex]
            self._lines.append([{"mark": mine[0]}])
            self.marks.append(mine[0])
        self.mark = mine[0]
        """The mark of this run; the service gets it with every batch."""

    @classmethod
    def beside(cls, ledger: Ledger) -> Self:
        """Return the journal of a ledger, together with those of the ledgers it takes over."""
        return cls(_beside(ledger.path), [_beside(path) for path in ledger.earlier])

    def note_collected(self, batch: str) -> None:
        """Record that every reply of a batch is in the ledger."""
        self.collected.add(batch)
        self._lines.append([{"collected": batch}])

    def _read(self, path: Path) -> None:
        for row in _rows(path):
            if isinstance(row.get("mark"), str):
                self.marks.append(row["mark"])
            else:
                self.collected.add(row["collected"])


def _beside(ledger: Path) -> Path:
    return ledger.with_name("batches.jsonl")


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        # a last line without its end was cut by a crash: it never counted
        rows = [json.loads(line) for line in text.splitlines(True) if line[-1] == "\n"]
        for row in rows:
            if not any(isinstance(row.get(name), str) for name in ("mark", "collected")):
                raise ValueError(f"{row!r:.200} names neither a mark nor a batch")
    except (AttributeError, RecursionError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; move it away and run again") from error
    return rows
