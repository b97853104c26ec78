"""What is to be generated, in the order of the contexts, and how far each item is.

Everything here follows from the contexts and the ledger alone, so that a run that was killed goes
on as if nothing had been, and given replies always make the same data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from llavakit import ImageContext, Message, Stopped
from llavakit.contracts.data import ResponseKind
from llavakit_plugins.generation.conversations import Failures
from llavakit_plugins.generation.requests.ledger import (
    Entry,
    Ledger,
    Request,
    RequestRecord,
    record_of,
)
from llavakit_plugins.generation.requests.prompted import PromptedGenerator, Verdict

DUPLICATE = "the same as the reply on another image"


@dataclass(frozen=True)
class Item:
    """One context and kind, with what came of it so far."""

    context: ImageContext
    kind: ResponseKind
    verdict: Verdict | None
    """Of the newest reply; None where there is none."""
    entry: Entry | None
    """That reply."""
    refused: tuple[str, ...]
    """Why the replies before, or all of them, were rejected."""
    record: RequestRecord
    request: Request
    """The next request, where one more is to be made."""
    open: bool
    """Whether it is to be made."""


class Items:
    """The items of a job."""

    def __init__(
        self,
        contexts: Sequence[ImageContext],
        kinds: Sequence[ResponseKind],
        counts: Mapping[ResponseKind, int],
        generator: PromptedGenerator,
        attempts: int,
        seed: int,
        failures: Failures | None = None,
    ) -> None:
        self._contexts, self._kinds = contexts, kinds
        self._generator, self._attempts, self._failures = generator, attempts, failures
        self._worked = 0
        """How often the generator did what it is for."""
        self.chosen = choose(len(contexts), kinds, counts, seed)

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self.chosen.values())

    def pairs(self) -> Iterator[tuple[ImageContext, ResponseKind]]:
        """Yield what is asked about, in order."""
        for index in range(len(self._contexts)):
            kinds = [kind for kind in self._kinds if self.chosen[kind][index]]
            if kinds:
                context = self._contexts[index]
                for kind in kinds:
                    yield context, kind

    def walk(self, ledger: Ledger) -> Iterator[Item]:
        """Yield every item as the ledger has it."""
        identity = self._generator.chat.identity
        verdict: Verdict | None
        seen: set[bytes] = set()
        for context, kind in self.pairs():
            label = f"{context.id}-{kind}"
            try:
                messages = self._generator.messages(context, kind)
            except Exception as error:
                nothing = Request((Message("user", ""),), 0, label)
                record = record_of(identity, nothing)
                verdict = self._failed(label, error)
                yield Item(context, kind, verdict, None, verdict.notes, record, nothing, False)
                continue
            self._worked += 1
            refused: list[str] = []
            verdict = None
            entry: Entry | None = None
            is_open = False
            for draw in range(self._attempts):
                request = Request(messages, draw, label)
                record = record_of(identity, request)
                found = ledger.get(record.key)
                if found is None:
                    is_open = True
                    break
                entry = found
                try:
                    verdict = self._generator.read(context, kind, entry.reply)
                except Exception as error:  # another reply is not the remedy
                    verdict = self._failed(label, error)
                    refused += verdict.notes
                    break
                self._worked += 1
                if verdict.outcome != "rejected":
                    mark = _mark(verdict)
                    if mark not in seen:
                        seen.add(mark)
                        break
                    verdict = Verdict("rejected", notes=(DUPLICATE,))
                refused += verdict.notes
            yield Item(context, kind, verdict, entry, tuple(refused), record, request, is_open)

    def _failed(self, label: str, error: Exception) -> Verdict:
        """Return the verdict on what the generator fails at: one of many, as a rule."""
        if self._failures is None or isinstance(error, Stopped):
            raise error
        self._failures.add(label, error, self._worked)
        return Verdict("rejected", notes=(self._failures.reason(label),))


def choose(
    total: int, kinds: Sequence[ResponseKind], counts: Mapping[ResponseKind, int], seed: int
) -> dict[ResponseKind, NDArray[np.bool_]]:
    """Return for each kind which contexts it takes: all, or so many at random."""
    chosen = {}
    for number, kind in enumerate(kinds):
        mask = np.zeros(total, bool)
        order = np.random.default_rng([seed, number]).permutation(total)
        mask[order[: counts.get(kind, total)]] = True
        chosen[kind] = mask
    return chosen


def _mark(verdict: Verdict) -> bytes:
    """Return what tells the answers of one conversation from another's."""
    answers = " ".join(turn.text for turn in verdict.turns if turn.role == "gpt")
    return blake2b(
        " ".join(answers.lower().split()).encode(errors="replace"), digest_size=12
    ).digest()
