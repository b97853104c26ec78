"""Keeps the conversations that a generator of any kind made, and reports where it failed."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit import (
    DataError,
    Generator,
    ImageContext,
    LlavaError,
    PluginError,
    Reply,
    Stopped,
    Turn,
    Use,
    shown,
    write_text,
)
from llavakit.contracts.data import ResponseKind, Sample
from llavakit_plugins.generation.requests.ledger import (
    SUFFIX,
    Entry,
    Ledger,
    RequestRecord,
    ledgers_in,
    short_hash,
)

if TYPE_CHECKING:
    from llavakit_plugins.generation.options import GenerateOptions

FILE = "conversations"
_PATIENCE = 10  # failures without any success before the step stops
_WRITE_EVERY = 5.0  # seconds between writes of conversations without a service to the disk
_MOST_MADE = 1 << 15  # of them that wait in memory
_MOST_SHARED = 1000  # the same of a share of a job, whose ledger other runs join
_TOLD = 20  # failures whose traceback is written down


@dataclass(frozen=True)
class Conversation:
    """The conversation that a generator made from one context and kind."""

    turns: tuple[Turn, ...] = ()
    """Empty if no attempt could be used."""
    refused: tuple[str, ...] = ()
    """Why the failed attempts cannot be used."""
    attempt: int = 0


class Conversations:
    """A ledger of the conversations of one generator with certain options."""

    def __init__(self, path: Path, use: Use[Generator], joined: Sequence[Path] = ()) -> None:
        self._use = json.dumps(use.model_dump(mode="json"), sort_keys=True)
        earlier = [*earlier_conversations(path), *joined]
        self.ledger = Ledger(path, identity=self._use, earlier=earlier)

    def record(self, context: ImageContext, kind: ResponseKind) -> RequestRecord:
        """Return the ledger's record of a conversation; its key is a hash of all its sources.

        That is the generator with its options, the context and the kind.
        """
        # the whole context and not its id:
        # after a change of its captions it is another conversation
        source = short_hash(json.dumps([context, kind], default=vars))
        maker = short_hash(self._use)
        key = short_hash(f"{maker} {source}")
        return RequestRecord(key, maker, source, 0, f"{context.id}-{kind}")

    def get(self, context: ImageContext, kind: ResponseKind) -> tuple[Conversation, Entry] | None:
        """Return a conversation that was made before, with its ledger entry, or None.

        Raises DataError if the entry holds no conversation.
        """
        entry = self.ledger.get(self.record(context, kind).key)
        if entry is None:
            return None
        try:
            row = json.loads(entry.text)
            turns = tuple(Turn(str(role), str(text)) for role, text in row["turns"])  # type: ignore[arg-type]
            found = Conversation(turns, tuple(map(str, row["refused"])), entry.draw)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.ledger.path} holds no conversation for {entry.label} ({error!r}); delete "
                "it, and it is made again: "
                f"sqlite3 {FILE}{SUFFIX} \"DELETE FROM replies WHERE key = '{entry.key}'\""
            ) from error
        return found, entry

    def entry(self, context: ImageContext, kind: ResponseKind, made: Conversation) -> Entry:
        """Return the ledger entry of a conversation."""
        row = {"turns": [[turn.role, turn.text] for turn in made.turns], "refused": made.refused}
        record = self.record(context, kind)
        return RequestRecord(
            record.key, record.identity, record.prompt, made.attempt, record.label
        ).entry(Reply(json.dumps(row)))


def earlier_conversations(path: Path) -> list[Path]:
    """Return the conversations' files of attempts that were set aside."""
    folder = path.parent
    return ledgers_in(sorted((folder.parent / "superseded").glob(f"{folder.name}.*")), FILE)


def ledgers_to_join(options: GenerateOptions, name: str) -> list[Path]:
    """Return the ledgers of this name that a job's shares left. Raises DataError for a folder
    that the step did not leave."""
    for folder in options.join:
        if not any(ledgers_in([folder], name) for name in ("ledger", FILE)):
            raise DataError(
                f"{folder} holds no ledger; `join` names folders that the step `generate` left, "
                "such as runs/part-1/01-generate"
            )
    return ledgers_in(options.join, name)


def checked(turns: Any, context: ImageContext, kind: ResponseKind) -> tuple[Turn, ...]:
    """Return the turns that a generator returned.

    Raises TypeError if they are not turns, DataError if they are no complete conversation.
    """
    found = tuple(turns)
    if not all(isinstance(turn, Turn) and isinstance(turn.text, str) for turn in found):
        raise TypeError(f"`generate` gives {[type(t).__name__ for t in found]}, not turns of text")
    Sample(f"{context.id}-{kind}", found, (Path(context.image),)).check()
    if found[-1].role != "gpt" or not all(turn.text.strip() for turn in found):
        raise DataError(f"conversation `{context.id}-{kind}` has a question or answer left empty")
    return found


@dataclass
class Failures:
    """The errors that a generator raised, reported so that its author can fix them."""

    name: str
    path: Path
    """The file for tracebacks."""
    errors: dict[str, Exception] = field(default_factory=dict)
    """The errors by conversation."""

    def __post_init__(self) -> None:
        self.path.unlink(missing_ok=True)  # left by an earlier attempt

    def add(self, label: str, error: Exception, made: int) -> None:
        """Record one error; `made` is the number of conversations made so far.

        Raises it, or an error about all of them, if the generator has made nothing else.
        """
        if not made and not self.errors and isinstance(error, LlavaError):
            raise error  # if the very first one fails, the cause is usually common to all
        self.errors[label] = error
        if not made and len(self.errors) >= _PATIENCE:
            raise self.complaint(len(self.errors))

    def reason(self, label: str) -> str:
        """Return in one line why there is no such conversation."""
        error = self.errors[label]
        kind = "" if isinstance(error, LlavaError) else f"{type(error).__name__}: "
        return shown(f"the generator failed: {kind}{error}")

    def complaint(self, total: int) -> LlavaError:
        """Return the error that reports all failures; tracebacks of bugs are written to `path`.

        An error that is no LlavaError is a bug: its text is not written for users.
        """
        label = next(iter(self.errors))
        bugs = [error for error in self.errors.values() if not isinstance(error, LlavaError)]
        where = ""
        if bugs:
            texts = ["".join(traceback.format_exception(error)) for error in bugs[:_TOLD]]
            write_text(self.path, shown("\n".join(texts)))
            where = f"; where: {self.path}"
        return (PluginError if bugs else DataError)(
            f"generator `{self.name}` failed at {len(self.errors)} of {total} conversations; what "
            f"it made is kept, and --resume makes these alone. The first, {label}: "
            f"{self.reason(label).partition(': ')[2]}{where}"
        )


class Keeping:
    """Saves the conversations of a generator without a chat model, for a step that is stopped."""

    def __init__(self, folder: Path, options: GenerateOptions) -> None:
        self._path, self._use = folder / f"{FILE}{SUFFIX}", options.generator
        self._most = _MOST_MADE if options.shard is None else _MOST_SHARED
        self._made: list[tuple[ImageContext, ResponseKind, tuple[Turn, ...]]] = []
        self._kept: Conversations | None = None
        self._written = time.monotonic()
        # one that was soon done left no ledger: what it made is made again
        joined = ledgers_in(options.join, FILE)
        if joined or ledgers_in([folder], FILE) or earlier_conversations(self._path):
            self._kept = Conversations(self._path, options.generator, joined)
        # what this attempt makes it asks for once
        self._earlier = self._kept if self._kept is not None and len(self._kept.ledger) else None

    @property
    def count(self) -> int:
        """Number of conversations, of this attempt and of earlier ones."""
        return len(self._made) + (0 if self._kept is None else len(self._kept.ledger))

    def get(self, context: ImageContext, kind: ResponseKind) -> tuple[Turn, ...] | None:
        """Return the turns of a conversation that was made before, or None."""
        found = None if self._earlier is None else self._earlier.get(context, kind)
        return None if found is None else found[0].turns

    def add(self, context: ImageContext, kind: ResponseKind, turns: tuple[Turn, ...]) -> None:
        """Record a conversation that was just made."""
        self._made.append((context, kind, turns))
        # many together: a generator without a service makes thousands a second, and an fsync for
        # each would take most of the time; a job that is over soon writes none at all
        if len(self._made) >= self._most or time.monotonic() - self._written >= _WRITE_EVERY:
            self._write()

    @contextmanager
    def unless_done(self, failures: Failures) -> Iterator[None]:
        """Write all conversations to disk if the block raises or the generator failed; then raise.

        A step that finishes writes its data anyway, so the ledger would only repeat it.
        """
        try:
            yield
            if failures.errors:
                raise failures.complaint(len(failures.errors) + self.count)
        except (LlavaError, Stopped):
            self._write()
            raise
        finally:
            if self._kept is not None:
                self._kept.ledger.close()

    def _write(self) -> None:
        if self._made:
            self._kept = kept = self._kept or Conversations(self._path, self._use)
            kept.ledger.append(*(kept.entry(c, k, Conversation(t)) for c, k, t in self._made))
        self._made, self._written = [], time.monotonic()
