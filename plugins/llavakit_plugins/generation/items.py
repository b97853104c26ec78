"""The items that a job generates, in the order of the contexts, and the state of each.

The state depends on the contexts and the ledger only. So a killed run continues as if it had not
been killed, and the same replies always give the same data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
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
from llavakit_plugins.generation.requests.shelf import Shelf

DUPLICATE = "the same as the reply on another image"


@dataclass(frozen=True)
class Item:
    """One context and kind of response, and its state."""

    context: ImageContext
    kind: ResponseKind
    verdict: Verdict | None
    """The verdict on the newest reply; None if there is no reply."""
    entry: Entry | None
    """The newest reply."""
    refused: tuple[str, ...]
    """Why replies were rejected so far."""
    record: RequestRecord
    request: Request
    """The next request if the item is open, otherwise the last one."""
    open: bool
    """Whether `request` is still to be sent."""


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
        share: range | None = None,
    ) -> None:
        """`share` holds the indices of the contexts that this job takes; by default all."""
        self._contexts, self._kinds = contexts, kinds
        self._generator, self._attempts, self._failures = generator, attempts, failures
        self._worked = 0
        """How often the generator worked without an error."""
        self.share = share if share is not None else range(len(contexts))
        self.chosen = choose(len(contexts), kinds, counts, seed)

    def __len__(self) -> int:
        share = slice(self.share.start, self.share.stop)
        return sum(int(np.count_nonzero(mask[share])) for mask in self.chosen.values())

    def pairs(self) -> Iterator[tuple[ImageContext, ResponseKind]]:
        """Yield the context and kind of each item, in order."""
        for index in self.share:
            kinds = [kind for kind in self._kinds if self.chosen[kind][index]]
            if kinds:
                context = self._contexts[index]
                for kind in kinds:
                    yield context, kind

    def walk(self, ledger: Ledger) -> Iterator[Item]:
        """Yield every item with its state according to the ledger.

        Replies are judged each time, which is cheap; so verdicts are not stored, and a changed
        generator judges the old replies, too.
        """
        identity = self._generator.chat.identity
        with closing(Shelf()) as seen:
            yield from self._walk(ledger, identity, seen)

    def _walk(self, ledger: Ledger, identity: str, seen: Shelf) -> Iterator[Item]:
        verdict: Verdict | None
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
            # from the first reply on, each time: which draw is next follows from the ledger alone
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
                except Exception as error:  # a bug in the generator: another reply would not help
                    verdict = self._failed(label, error)
                    refused += verdict.notes
                    break
                self._worked += 1
                if verdict.outcome != "rejected":
                    # teachers sometimes give one answer for two images;
                    # the second of them says nothing of its own
                    if seen.add(_mark(verdict)):
                        break
                    verdict = Verdict("rejected", notes=(DUPLICATE,))
                refused += verdict.notes
            yield Item(context, kind, verdict, entry, tuple(refused), record, request, is_open)

    def _failed(self, label: str, error: Exception) -> Verdict:
        """Record an error of the generator and return a verdict that rejects the item."""
        if self._failures is None or isinstance(error, Stopped):
            raise error
        self._failures.add(label, error, self._worked)
        return Verdict("rejected", notes=(self._failures.reason(label),))


def choose(
    total: int, kinds: Sequence[ResponseKind], counts: Mapping[ResponseKind, int], seed: int
) -> dict[ResponseKind, NDArray[np.bool_]]:
    """Return for each kind a mask of the contexts it uses: all, or `counts[kind]` at random."""
    chosen: dict[ResponseKind, NDArray[np.bool_]] = {}
    for number, kind in enumerate(kinds):
        if counts.get(kind, total) >= total:
            chosen[kind] = np.broadcast_to(np.bool_(True), total)  # which takes no memory
            continue
        mask = np.zeros(total, bool)
        order = np.random.default_rng([seed, number]).permutation(total)
        mask[order[: counts[kind]]] = True
        chosen[kind] = mask
    return chosen


def _mark(verdict: Verdict) -> bytes:
    """Return a hash of a conversation's answers, without case and spacing, to find duplicates."""
    answers = " ".join(turn.text for turn in verdict.turns if turn.role == "gpt")
    return blake2b(
        " ".join(answers.lower().split()).encode(errors="replace"), digest_size=12
    ).digest()
