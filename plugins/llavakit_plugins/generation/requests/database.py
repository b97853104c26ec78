"""The database of a ledger: its tables, how one is made whole or not at all, and what can be wrong.

SQLite in WAL mode with `synchronous = FULL`: a transaction is on the disk before others see it, and
costs one fsync. At rest the file is in rollback mode, so that it is a single file that can be
copied, and read where nothing may be written.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from llavakit import DataError, LlavaError, sync
from llavakit_plugins.generation.requests.entries import Entry, read_entry, read_line

VERSION = 1
_BLOCK = 1000  # rows that are read or written at a time
_LARGE = 1 << 26  # bytes of a file whose taking over is worth a word
_PATIENCE = 30.0  # seconds to wait for another program that holds the file for a moment
_CACHE = 16_000  # KiB of pages in memory
_HEADER = b"SQLite format 3\x00"
_NAMES = tuple(field.name for field in fields(Entry))
_COLUMNS = ", ".join(_NAMES)
_log = logging.getLogger(__name__)

_TABLES = """
CREATE TABLE identities (number INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE);
CREATE TABLE replies (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL, identity INTEGER NOT NULL, prompt TEXT NOT NULL,
    draw INTEGER NOT NULL, label TEXT NOT NULL, time REAL NOT NULL, text TEXT NOT NULL,
    finish TEXT NOT NULL, model TEXT NOT NULL, input_tokens INTEGER, output_tokens INTEGER, usd REAL
);
CREATE TABLE totals (
    replies INTEGER, priced INTEGER, usd REAL, input_tokens INTEGER, output_tokens INTEGER
);
CREATE TABLE taken (source TEXT PRIMARY KEY);
CREATE VIEW entries AS
    SELECT replies.number, key, identities.hash AS identity, prompt, draw, label, time, text,
        finish, model, input_tokens, output_tokens, usd
    FROM replies LEFT JOIN identities ON identities.number = replies.identity;
"""

# made behind the rows: an index in the order of keys, which are random, is then sorted once,
# instead of being written to all over with every row
_UNIQUE = "CREATE UNIQUE INDEX replies_by_key ON replies (key)"

# the totals make opening a ledger cheap; they also hold where a person deletes a row
_TOTALS = """
INSERT INTO totals SELECT count(*), count(usd), total(usd), CAST(total(input_tokens) AS INTEGER),
    CAST(total(output_tokens) AS INTEGER) FROM replies;
CREATE TRIGGER added AFTER INSERT ON replies BEGIN
    UPDATE totals SET replies = replies + 1, priced = priced + (new.usd IS NOT NULL),
        usd = usd + ifnull(new.usd, 0), input_tokens = input_tokens + ifnull(new.input_tokens, 0),
        output_tokens = output_tokens + ifnull(new.output_tokens, 0);
END;
CREATE TRIGGER removed AFTER DELETE ON replies BEGIN
    UPDATE totals SET replies = replies - 1, priced = priced - (old.usd IS NOT NULL),
        usd = usd - ifnull(old.usd, 0), input_tokens = input_tokens - ifnull(old.input_tokens, 0),
        output_tokens = output_tokens - ifnull(old.output_tokens, 0);
END;
"""

# the cast: what is cut within a character comes as bytes, which SQLite stores as text all the same
_INSERT = f"""
INSERT OR IGNORE INTO replies ({_COLUMNS}) VALUES (
    ?, (SELECT number FROM identities WHERE hash = ?), ?, ?, CAST(? AS TEXT), ?, CAST(? AS TEXT),
    CAST(? AS TEXT), CAST(? AS TEXT), ?, ?, ?
)
"""
_TEXTS = [_NAMES.index(name) for name in ("label", "text", "finish", "model")]
_values: Callable[[Entry], tuple[Any, ...]] = attrgetter(*_NAMES)


def is_database(path: Path) -> bool:
    """Say whether a file is a database of SQLite, by its first bytes."""
    with path.open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says of a ledger into a sentence with a remedy."""
    try:
        yield
    except (sqlite3.InterfaceError, sqlite3.ProgrammingError):  # of the caller's, not of the file's
        raise
    except (sqlite3.Error, UnicodeDecodeError) as error:  # it may quote what is no text
        raise _sentence(path, error) from error


def _sentence(path: Path, error: Exception) -> LlavaError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
        reason = "no space left on the disk" if name == "SQLITE_FULL" else str(error)
        return LlavaError(
            f"cannot write {path}: {reason}; free some space or choose another place to write to: "
            "replies that are in it stay"
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return LlavaError(f"another program holds {path}; close it and run again")
    return DataError(
        f"{path} is damaged, or no ledger ({error}); `sqlite3 {path.name} .recover | sqlite3 "
        "recovered.sqlite` saves what can be read, to be put in its place; if it is moved away, "
        "its replies are asked and paid for again"
    )


def connect(path: Path | None, *, writable: bool) -> sqlite3.Connection:
    """Open a ledger's database; None is one that lasts as long as the connection.

    Raises DataError for a database that is no ledger.
    """
    if path is None:
        address = ""
    else:
        mode = "rw" if writable else "ro"
        # where nothing may be written, SQLite cannot make the files by which processes share one
        shared = writable or os.access(path.parent, os.W_OK) or _log_of(path).exists()
        alone = "" if shared else "&immutable=1"
        address = f"{path.absolute().as_uri()}?mode={mode}{alone}"
    opened = sqlite3.connect(
        # autocommit: transactions are begun by name; threads of one process may share it
        address, uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
    )  # fmt: skip
    try:
        opened.text_factory = _text
        opened.execute("PRAGMA trusted_schema = OFF")  # the file may be of anybody
        opened.execute(f"PRAGMA cache_size = -{_CACHE}")
        if path is not None:
            (version,) = opened.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise DataError(f"{path} is a ledger of a newer llavakit; upgrade, then run again")
            opened.execute("SELECT replies FROM totals").fetchone()
    except BaseException:
        opened.close()
        raise
    return opened


def _log_of(path: Path) -> Path:
    """Return the file that holds the changes of a database that are not in it yet."""
    return path.with_name(f"{path.name}-wal")


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # of a damaged row, which its reader names
        return data


def read_totals(database: sqlite3.Connection) -> tuple[int, int, float, int, int]:
    """Return how many replies there are and have a price, USD, and tokens sent and received."""
    row: tuple[int, int, float, int, int] = database.execute("SELECT * FROM totals").fetchone()
    if row is None or not all(isinstance(value, int | float) and value >= 0 for value in row):
        raise sqlite3.DatabaseError(f"its totals are {row!r:.200}")
    return row


def read_by_key(database: sqlite3.Connection, path: Path, key: str) -> Entry | None:
    """Return the entry of a key, or None."""
    found = database.execute(f"SELECT number, {_COLUMNS} FROM entries WHERE key = ?", (key,))
    row = found.fetchone()
    return None if row is None else _entry(row, path)


def read_all(database: sqlite3.Connection, path: Path) -> Iterator[Entry]:
    """Yield all entries in the order in which they came."""
    last = -1
    # in blocks: a query that stays open would keep the log of changes from being worked in
    while rows := database.execute(
        f"SELECT number, {_COLUMNS} FROM entries WHERE number > ? ORDER BY number LIMIT {_BLOCK}",
        (last,),
    ).fetchall():
        for row in rows:
            yield _entry(row, path)
        last = rows[-1][0]


def _entry(row: tuple[Any, ...], path: Path) -> Entry:
    try:
        return read_entry(dict(zip(_NAMES, row[1:], strict=True)))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"reply {row[0]} in {path} is damaged ({error}); delete it, and it is asked for again: "
            f'sqlite3 {path.name} "DELETE FROM replies WHERE number = {row[0]}"'
        ) from error


def write(database: sqlite3.Connection, entries: Sequence[Entry]) -> None:
    """Add entries whose keys are not known yet, within a transaction of the caller's."""
    identities = {(entry.identity,) for entry in entries}
    database.executemany("INSERT OR IGNORE INTO identities (hash) VALUES (?)", identities)
    database.executemany(_INSERT, map(_row, entries))


def _row(entry: Entry) -> tuple[Any, ...]:
    values = _values(entry)
    if all(values[index].isascii() for index in _TEXTS):
        return values
    row = list(values)
    for index in _TEXTS:
        row[index] = row[index].encode("utf-8", "surrogatepass")
    return tuple(row)


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Do all of the block's changes, or none; they are on the disk behind it."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # a full disk may have ended it already
            database.execute("ROLLBACK")
        raise


class Source:
    """A ledger whose replies are taken over, once: of a database, or of lines of JSON."""

    def __init__(self, path: Path, identities: frozenset[str] | None = None) -> None:
        """`identities` holds the hashes of the chat models whose replies are taken; None: all."""
        self.path, self._identities = path, identities
        found = path.stat()
        models = "" if identities is None else " ".join(sorted(identities))
        self.mark = f"{path.absolute()} {found.st_size} {found.st_mtime_ns} {models}"
        """What tells it from others, and from itself after a change."""
        if found.st_size > _LARGE:
            _log.warning("note: the replies in %s are taken over, once; this takes a while", path)

    def blocks(self) -> Iterator[list[Entry]]:
        """Yield the entries in the order in which they came, some at a time."""
        wanted = (
            entry
            for entry in self._entries()
            if self._identities is None or entry.identity in self._identities
        )
        while block := list(islice(wanted, _BLOCK)):
            yield block

    def _entries(self) -> Iterator[Entry]:
        if not is_database(self.path):
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    # a last line without its end was cut by a kill: it never counted
                    if line.endswith(b"\n"):
                        yield read_line(line, f"{self.path}:{number}")
            return
        with explained(self.path), closing(connect(self.path, writable=False)) as database:
            yield from read_all(database, self.path)


def fill(database: sqlite3.Connection, sources: Iterable[Source]) -> None:
    """Make the tables of a new database, with the replies of others."""
    database.executescript(_TABLES)
    with transaction(database):
        for source in sources:
            for block in source.blocks():
                write(database, block)
            database.execute("INSERT OR IGNORE INTO taken VALUES (?)", (source.mark,))
    try:
        database.execute(_UNIQUE)
    except sqlite3.IntegrityError:  # of two replies with one key the first one counts
        database.execute(
            "DELETE FROM replies WHERE number NOT IN (SELECT min(number) FROM replies GROUP BY key)"
        )
        database.execute(_UNIQUE)
    database.executescript(_TOTALS)
    database.execute(f"PRAGMA user_version = {VERSION}")


def create(path: Path, sources: Sequence[Source], replaced: Path | None) -> None:
    """Write a new ledger with the replies of others: whole, or not at all.

    `replaced`, where it is `path` itself, stays beside it as `NAME.old`.
    """
    partial = path.with_name(f".{path.name}.partial")
    journal = partial.with_name(f"{partial.name}-journal")
    with explained(path):
        for left in (partial, journal):  # by a process that was killed
            left.unlink(missing_ok=True)
        try:
            partial.touch()
            with closing(sqlite3.connect(partial, isolation_level=None)) as database:
                database.text_factory = _text
                database.execute("PRAGMA synchronous = OFF")  # it counts once it has its name
                database.execute(f"PRAGMA cache_size = -{_CACHE}")
                fill(database, sources)
            sync(partial)
            if replaced == path:
                old = path.with_name(f"{path.name}.old")
                if not old.exists():
                    try:
                        os.link(path, old)
                    except OSError:  # of a file system without links
                        shutil.copy2(path, old)
            _log_of(path).unlink(missing_ok=True)  # of a file that somebody removed
            partial.replace(path)
            sync(path.parent)
        except BaseException:
            for left in (partial, journal):
                with suppress(OSError):
                    left.unlink()
            raise


def rest(database: sqlite3.Connection) -> None:
    """Leave a single file, before the last connection is closed."""
    # another process may be reading: then the log stays, and whoever opens the ledger works it in
    with suppress(sqlite3.Error):
        database.execute("PRAGMA busy_timeout = 0")
        database.execute("PRAGMA journal_mode = DELETE")
