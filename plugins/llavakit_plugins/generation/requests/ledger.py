"""The ledger: every reply is on disk before it counts, so that no request is paid for twice."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from llavakit import LlavaError, explain_write
from llavakit_plugins.generation.requests import database as db
from llavakit_plugins.generation.requests.entries import (
    Entry as Entry,
    Request as Request,
    RequestRecord as RequestRecord,
    hash_messages as hash_messages,
    key_of,
    record_of as record_of,
    short_hash as short_hash,
)

SUFFIX = ".sqlite"
_OLD_SUFFIX = ".jsonl"  # of ledgers that were lines of JSON


class Ledger:
    """The replies so far, in a database of SQLite. None of them stays in memory.

    Entries of the ledgers `earlier` that belong to `identity` (one, several, or None for any) are
    taken over, once; such ledgers are left by attempts with another recipe. So is one of lines of
    JSON in the place of this one, or beside `NAME.sqlite` as `NAME.jsonl`. Without `writable`
    nothing is changed, and another process may be writing to it. Raises DataError where it is
    damaged, LlavaError where another process writes to it.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: str | frozenset[str] | None = "",
        earlier: Iterable[Path] = (),
        writable: bool = True,
    ) -> None:
        self.path = path
        self.earlier = tuple(earlier)
        self._waiting: list[tuple[Entry, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._lock, self._lock_path = Lock(), path.with_name(f".{path.name}.lock")
        self._open = ExitStack()
        # replies of another model or of other settings would not be those of this recipe
        named = {identity} if isinstance(identity, str) else identity
        mine = None if named is None else frozenset(map(short_hash, named))
        with explain_write(path), db.explained(path):
            try:
                self._begin([db.Source(other, mine) for other in self.earlier], writable)
                self._count()
            except BaseException:
                self.close()
                raise

    def _begin(self, sources: list[db.Source], writable: bool) -> None:
        old = _lines_of(self.path)
        if not writable:
            self._database = self._reader = self._connected(None if old else self.path, False)
            if old is not None:
                db.fill(self._database, [db.Source(old)])
            return
        self._hold()
        sources = sources if old is None else [db.Source(old), *sources]
        if old is not None or not self.path.is_file() or not self.path.stat().st_size:
            db.create(self.path, sources, old)
        self._database = self._connected(self.path, True)
        self._open.callback(db.rest, self._database)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        # a connection of its own: what is not on the disk yet must not be seen
        self._reader = self._connected(self.path, False)
        for source in sources:
            query = "SELECT 1 FROM taken WHERE source = ?"
            if self._reader.execute(query, (source.mark,)).fetchone() is None:
                with db.transaction(self._database):
                    for block in source.blocks():
                        db.write(self._database, block)
                    self._database.execute("INSERT INTO taken VALUES (?)", (source.mark,))

    def _connected(self, path: Path | None, writable: bool) -> sqlite3.Connection:
        opened = db.connect(path, writable=writable)
        self._open.callback(opened.close)
        return opened

    def _hold(self) -> None:
        """Lock the ledger; the system unlocks it even where the process is killed."""
        from filelock import FileLock, Timeout  # slow to import, and reading needs no lock

        try:
            held = FileLock(self._lock_path).acquire(blocking=False)
        except Timeout:
            # together they would pay twice for a request, and spend more than either may
            raise LlavaError(
                f"another process asks by the ledger {self.path}; wait for it, or name another file"
            ) from None
        self._open.enter_context(held)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._open.close()

    def discard(self) -> None:
        """Close the file and remove it."""
        self.close()
        for path in (self.path, self._lock_path):
            path.unlink(missing_ok=True)

    @property
    def usd(self) -> float | None:
        """What the replies cost in USD; None if there are some and no price is known."""
        return self.spent if self._priced or not self._replies else None

    def __len__(self) -> int:
        return self._replies

    def __contains__(self, key: str) -> bool:
        with db.explained(self.path):
            query = "SELECT 1 FROM replies WHERE key = ?"
            return self._reader.execute(query, (key,)).fetchone() is not None

    def __iter__(self) -> Iterator[Entry]:
        """Yield all entries in the order in which they came."""
        with db.explained(self.path):
            yield from db.read_all(self._reader, self.path)

    def get(self, key: str) -> Entry | None:
        """Return the entry of a key, read from disk, or None."""
        with db.explained(self.path):
            return db.read_by_key(self._reader, self.path, key)

    def reply_to(self, prompt: str, draw: int) -> Entry | None:
        """Return the first entry for messages of this hash, of any chat model, or None."""
        with db.explained(self.path):
            # chat models are few, and the hash of each gives the key: no index by prompts is needed
            models = self._reader.execute("SELECT hash FROM identities ORDER BY number").fetchall()
        found = (self.get(key_of(model, prompt, draw)) for (model,) in models)
        return next((entry for entry in found if entry is not None), None)

    def append(self, *entries: Entry) -> None:
        """Append entries and wait until they are on disk. Known keys are skipped."""
        self._write(entries)

    async def write(self, entry: Entry) -> None:
        """Append one entry and wait until it is on disk.

        Entries that come during one write are written together in the next: one fsync for all.
        """
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._drain())
        await done

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                # in a thread, since fsync blocks
                await asyncio.to_thread(self._write, [entry for entry, _ in batch])
            except Exception as error:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
            else:
                for _, done in batch:
                    if not done.done():
                        done.set_result(None)

    def _write(self, entries: Sequence[Entry]) -> None:
        with self._lock, db.explained(self.path):
            with db.transaction(self._database):
                db.write(self._database, entries)
            self._count()

    def _count(self) -> None:
        self._replies, self._priced, usd, sent, made = db.read_totals(self._database)
        self.spent = usd
        """USD for all replies whose price is known."""
        self.input_tokens, self.output_tokens = sent, made


def ledgers_in(folders: Iterable[Path], name: str) -> list[Path]:
    """Return the ledgers of a name in these folders: databases, or lines of JSON."""
    found = (folder / f"{name}{suffix}" for folder in folders for suffix in (SUFFIX, _OLD_SUFFIX))
    # both where lines were taken over into the database
    first: dict[Path, Path] = {}
    for path in found:
        if path.is_file():
            first.setdefault(path.parent, path)
    return list(first.values())


def _lines_of(path: Path) -> Path | None:
    """Return the file of lines of JSON that is to be this ledger, if there is one."""
    if path.is_file():
        return path if path.stat().st_size and not db.is_database(path) else None
    beside = path.with_suffix(_OLD_SUFFIX)
    return beside if path.suffix == SUFFIX and beside.is_file() else None
