"""Keys and texts that are needed while a job runs: on the disk, since a job may have millions."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llavakit_plugins.generation.requests.database import explained

_CACHE = 16_000  # KiB of them in memory


class Shelf:
    """A table of texts by their keys, in a temporary file without a name."""

    def __init__(self) -> None:
        self._where = Path(tempfile.gettempdir())
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for statement in (
            "PRAGMA journal_mode = OFF",
            f"PRAGMA cache_size = -{_CACHE}",
            "CREATE TABLE kept (key BLOB PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID",
            "BEGIN",  # one transaction for all: nothing of it outlives the process
        ):
            self._database.execute(statement)

    def add(self, key: bytes, text: str = "") -> bool:
        """Add a key with its text; say whether it is new. The text of a known key stays."""
        with explained(self._where):
            query = "INSERT OR IGNORE INTO kept VALUES (?, ?)"
            return self._database.execute(query, (key, text)).rowcount == 1

    def get(self, key: bytes) -> str | None:
        """Return the text of a key, or None."""
        with explained(self._where):
            found = self._database.execute("SELECT text FROM kept WHERE key = ?", (key,))
            row: tuple[str] | None = found.fetchone()
        return None if row is None else row[0]

    def __iter__(self) -> Iterator[bytes]:
        """Yield the keys, sorted."""
        with explained(self._where):
            for (key,) in self._database.execute("SELECT key FROM kept ORDER BY key"):
                yield key

    def close(self) -> None:
        """Forget all of them."""
        self._database.close()
