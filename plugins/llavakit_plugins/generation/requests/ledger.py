"""The ledger: every reply is on disk before it counts, so that no request is paid for twice.

The file has one JSON object per line. Lines are only appended; half a line, left by a killed
process, is cut off when the file is opened again.
"""

from __future__ import annotations

import asyncio
import json
import re
import reprlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from hashlib import sha256
from io import BufferedReader
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llavakit import DataError, JsonLines, Message, Reply
from llavakit_plugins.generation.requests.pictures import hash_image

_BLOCK = 1000  # entries of an earlier ledger that are copied with one fsync


@dataclass(frozen=True)
class Request:
    """One request to a chat model."""

    messages: tuple[Message, ...]
    draw: int = 0
    """Number of the reply to these messages, from 0; another draw asks for another reply."""
    label: str = ""
    """What the request is for, for a person who reads the ledger."""


@dataclass(frozen=True)
class Entry:
    """One line of a ledger: a reply, and the request that it belongs to."""

    key: str
    identity: str
    """Hash of the chat model's identity."""
    prompt: str
    """Hash of the messages."""
    draw: int
    label: str
    time: float
    """When the reply came, in seconds since 1970."""
    text: str
    finish: str
    model: str
    input_tokens: int | None
    output_tokens: int | None
    usd: float | None

    @property
    def reply(self) -> Reply:
        """The reply itself."""
        return Reply(
            self.text, self.finish, self.model, self.input_tokens, self.output_tokens, self.usd
        )


def short_hash(text: str) -> str:
    """Return 128 bits of SHA-256, as hex."""
    return sha256(text.encode()).hexdigest()[:32]


def hash_messages(messages: Sequence[Message]) -> str:
    """Return the hash of the messages, which identifies a prompt; of images, of their content."""
    return short_hash(f"[{', '.join(map(_dumped, messages))}]")


def _dumped(message: Message) -> str:
    if not message.images:
        return _dumped_text(message.role, message.content)
    shown = [hash_image(image) for image in message.images]
    return json.dumps([message.role, message.content, shown])


@lru_cache(maxsize=1024)  # system messages and examples are the same in every request
def _dumped_text(role: str, content: str) -> str:
    return json.dumps([role, content])


@dataclass(frozen=True)
class RequestRecord:
    """What a ledger stores about a request; the messages only as a hash."""

    key: str
    """Identifies the reply: a hash of the model, the messages and the draw."""
    identity: str
    prompt: str
    draw: int
    label: str

    def entry(self, reply: Reply) -> Entry:
        """Return the entry for a reply that has just come."""
        return Entry(**asdict(self), time=round(time.time(), 3), **asdict(reply))


def record_of(identity: str, request: Request) -> RequestRecord:
    """Return what a ledger stores about a request to the chat model with this identity."""
    model, prompt = short_hash(identity), hash_messages(request.messages)
    key = short_hash(f"{model} {prompt} {request.draw}")
    return RequestRecord(key, model, prompt, request.draw, request.label)


class Ledger:
    """The replies so far. They stay on disk; memory holds only the offset of each.

    Entries of the ledgers `earlier` that belong to `identity` (one, several, or None for any) are
    copied into this one; such ledgers are left by attempts with another recipe. Without `writable`
    the file is not changed, and another process may be appending to it. Raises DataError if a line
    cannot be read.
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
        self.spent = 0.0
        """USD for all replies whose price is known."""
        self.input_tokens = self.output_tokens = 0
        self._priced = False
        # 16 bytes for a key and no text:
        # a ledger of a million replies then takes some 200 MB of memory
        self._offsets: dict[bytes, int] = {}
        self._waiting: list[tuple[Entry, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._lines = JsonLines(path) if writable else None
        self._reader: BufferedReader | None = None
        try:
            for start, entry in self._entries():
                self._note(entry, start)
            # replies of another model or of other settings would not be those of this recipe
            named = {identity} if isinstance(identity, str) else identity or ()
            mine = set(map(short_hash, named))
            for other in self.earlier:
                with Ledger(other, writable=False) as source:
                    same = (entry for entry in source if identity is None or entry.identity in mine)
                    while block := list(islice(same, _BLOCK)):
                        self._write(block)
        except BaseException:
            self.close()
            raise

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
        if self._reader is not None:
            self._reader.close()

    @property
    def usd(self) -> float | None:
        """What the replies cost in USD; None if there are some and no price is known."""
        return self.spent if self._priced or not self._offsets else None

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._offsets

    def __iter__(self) -> Iterator[Entry]:
        """Yield all entries in the order in which they came."""
        for start in self._offsets.values():
            yield self._read(start)

    def get(self, key: str) -> Entry | None:
        """Return the entry of a key, read from disk, or None."""
        start = self._offsets.get(bytes.fromhex(key))
        return None if start is None else self._read(start)

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
                # in a thread, since fsync blocks; one task at a time writes: no lock is needed
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
        fresh = {entry.key: entry for entry in entries if entry.key not in self}
        if not fresh:
            return
        assert self._lines is not None
        starts = self._lines.append(map(asdict, fresh.values()))
        for entry, start in zip(fresh.values(), starts, strict=True):
            self._note(entry, start)

    def _note(self, entry: Entry, start: int) -> None:
        self._offsets.setdefault(bytes.fromhex(entry.key), start)
        self.spent += entry.usd or 0.0
        self._priced |= entry.usd is not None
        self.input_tokens += entry.input_tokens or 0
        self.output_tokens += entry.output_tokens or 0

    def _read(self, start: int) -> Entry:
        if self._reader is None:
            self._reader = self.path.open("rb")
        self._reader.seek(start)
        return _parse(self._reader.readline(), str(self.path))

    def _entries(self) -> Iterator[tuple[int, Entry]]:
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):  # another process may have written only half of the last
                    yield start, _parse(line, f"{self.path}:{number}")
                    start += len(line)


_FIELDS = {field.name: str(field.type) for field in fields(Entry)}
_KEY = re.compile(r"[0-9a-f]{32}")
_MOST = 2.0**63  # limit of a number in a ledger; the comparison refuses NaN, too


def _parse(line: bytes, where: str) -> Entry:
    try:
        row: dict[str, Any] = json.loads(line)
        given = {name: value for name, value in row.items() if name in _FIELDS}
        for name, value in given.items():
            if not _fits(value, _FIELDS[name]):
                raise TypeError(f"`{name}` is {type(value).__name__} {reprlib.repr(value)}")
        entry = Entry(**given)
        if not _KEY.fullmatch(entry.key):
            raise ValueError(f"`key` is {reprlib.repr(entry.key)}")
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} is no line of a ledger ({error}); remove that line: its reply is then asked "
            "for again"
        ) from error
    return entry


def _fits(value: object, kind: str) -> bool:
    """Return whether a JSON value has the type of a field."""
    if value is None:
        return kind.endswith(" | None")
    if kind.startswith("str"):
        return isinstance(value, str)
    numbers = int if kind.startswith("int") else int | float
    return isinstance(value, numbers) and not isinstance(value, bool) and 0 <= value < _MOST
