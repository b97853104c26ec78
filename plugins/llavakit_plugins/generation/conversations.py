"""Conversations that a generator of any kind made: each kept, and what it failed at said."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
from llavakit_plugins.generation.requests.ledger import Entry, Ledger, RequestRecord, short_hash

FILE = "conversations.jsonl"
_PATIENCE = 10  # conversations that fail before one is made, before the step stops
_TOLD = 20  # failures of which the traceback is kept


@dataclass(frozen=True)
class Conversation:
    """One context and kind, and what a generator made of them."""

    turns: tuple[Turn, ...] = ()
    refused: tuple[str, ...] = ()
    """Why attempts before, or all of them, cannot be used."""
    attempt: int = 0


class Conversations:
    """A ledger of the conversations of one generator with its options."""

    def __init__(self, path: Path, use: Use[Generator]) -> None:
        self._use = json.dumps(use.model_dump(mode="json"), sort_keys=True)
        self.ledger = Ledger(path, identity=self._use, earlier=earlier_conversations(path))

    def record(self, context: ImageContext, kind: ResponseKind) -> RequestRecord:
        """Return what the ledger knows a conversation by: all that it is made from."""
        source = short_hash(json.dumps([asdict(context), kind]))
        maker = short_hash(self._use)
        key = short_hash(f"{maker} {source}")
        return RequestRecord(key, maker, source, 0, f"{context.id}-{kind}")

    def get(self, context: ImageContext, kind: ResponseKind) -> tuple[Conversation, Entry] | None:
        """Return a conversation that was made before, and when, or None."""
        entry = self.ledger.get(self.record(context, kind).key)
        if entry is None:
            return None
        try:
            row = json.loads(entry.text)
            turns = tuple(Turn(str(role), str(text)) for role, text in row["turns"])  # type: ignore[arg-type]
            found = Conversation(turns, tuple(map(str, row["refused"])), entry.draw)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.ledger.path} holds no conversation for {entry.label} ({error!r}); remove "
                "that line: it is then made again"
            ) from error
        return found, entry

    def entry(self, context: ImageContext, kind: ResponseKind, made: Conversation) -> Entry:
        """Return the line of the ledger for a conversation."""
        row = {"turns": [[turn.role, turn.text] for turn in made.turns], "refused": made.refused}
        record = self.record(context, kind)
        return RequestRecord(
            record.key, record.identity, record.prompt, made.attempt, record.label
        ).entry(Reply(json.dumps(row)))


def earlier_conversations(path: Path) -> list[Path]:
    """Return the files of attempts that were set aside."""
    return sorted((path.parent.parent / "superseded").glob(f"{path.parent.name}.*/{FILE}"))


def checked(turns: Any, context: ImageContext, kind: ResponseKind) -> tuple[Turn, ...]:
    """Return what a generator gives. Raises DataError where it is no conversation of an image."""
    found = tuple(turns)
    if not all(isinstance(turn, Turn) and isinstance(turn.text, str) for turn in found):
        raise TypeError(f"`generate` gives {[type(t).__name__ for t in found]}, not turns of text")
    Sample(f"{context.id}-{kind}", found, (Path(context.image),)).check()
    if found[-1].role != "gpt" or not all(turn.text.strip() for turn in found):
        raise DataError(f"conversation `{context.id}-{kind}` has a question or answer left empty")
    return found


@dataclass
class Failures:
    """What a generator raised, for whoever wrote it."""

    name: str
    path: Path
    """Where tracebacks go."""
    errors: dict[str, Exception] = field(default_factory=dict)
    """By the conversation's id."""

    def __post_init__(self) -> None:
        self.path.unlink(missing_ok=True)  # of an attempt before this one

    def add(self, label: str, error: Exception, made: int) -> None:
        """Note one. Raises it, or all, where a generator has made nothing but them."""
        if not made and not self.errors and isinstance(error, LlavaError):
            raise error  # of what all conversations have in common, as a rule
        self.errors[label] = error
        if not made and len(self.errors) >= _PATIENCE:
            raise self.complaint(len(self.errors))

    def reason(self, label: str) -> str:
        """Return why there is no such conversation, in one line."""
        error = self.errors[label]
        kind = "" if isinstance(error, LlavaError) else f"{type(error).__name__}: "
        return shown(f"the generator failed: {kind}{error}")

    def complaint(self, total: int) -> LlavaError:
        """Return what is to be said of them; tracebacks of what is nobody's sentence are kept."""
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
    """Keeps what a generator without a chat model made, where the step does not come to its end."""

    def __init__(self, folder: Path, use: Use[Generator]) -> None:
        self._path, self._use = folder / FILE, use
        self._made: list[tuple[ImageContext, ResponseKind, tuple[Turn, ...]]] = []
        self._before: Conversations | None = None
        if self._path.is_file() or earlier_conversations(self._path):
            self._before = Conversations(self._path, use)

    @property
    def count(self) -> int:
        """How many conversations there are."""
        return len(self._made) + (0 if self._before is None else len(self._before.ledger))

    def get(self, context: ImageContext, kind: ResponseKind) -> tuple[Turn, ...] | None:
        """Return the turns of a conversation that was made before, or None."""
        found = None if self._before is None else self._before.get(context, kind)
        return None if found is None else found[0].turns

    def add(self, context: ImageContext, kind: ResponseKind, turns: tuple[Turn, ...]) -> None:
        """Note a conversation that was made just now."""
        self._made.append((context, kind, turns))

    @contextmanager
    def unless_done(self, failures: Failures) -> Iterator[None]:
        """Put all on the disk where the block raises or the generator failed, which is raised."""
        try:
            yield
            if failures.errors:
                raise failures.complaint(len(failures.errors) + self.count)
        except (LlavaError, Stopped):
            if self._made:
                self._before = kept = self._before or Conversations(self._path, self._use)
                kept.ledger.append(*(kept.entry(c, k, Conversation(t)) for c, k, t in self._made))
            raise
        finally:
            if self._before is not None:
                self._before.ledger.close()
