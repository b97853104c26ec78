"""Sends many requests to a judge, several at a time and each only once; every reply is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from llavakit import ChatError, ChatModel, Message, Run
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.rows import listed
from llavakit_plugins.generation.requests.ledger import (
    SUFFIX,
    Entry,
    Ledger,
    Request,
    ledgers_in,
    record_of,
)
from llavakit_plugins.generation.requests.send_all import send_all
from llavakit_plugins.generation.requests.thinking import without_thinking

_LEDGER = "judge"


def _silent(done: int, total: int, note: str = "") -> None:
    """Show nothing."""


@dataclass(frozen=True)
class JudgeSettings:
    """How requests are sent to a judge."""

    concurrency: int = 8
    """Requests in flight at once."""
    ledger: Path | None = None
    """File that keeps the replies; with None they are not kept."""
    earlier: Sequence[Path] = ()
    """Ledgers of attempts that were set aside; their replies are used again."""
    progress: Progress = _silent
    stopping: Callable[[], bool] = lambda: False

    @classmethod
    def within(cls, run: Run, concurrency: int) -> Self:
        """Return the settings for `run`, whose folder (below a step's) keeps the replies."""
        folder, step = run.directory, run.directory.parent
        # where a run puts steps aside whose recipe has changed: their replies are paid for
        aside = sorted((step.parent / "superseded").glob(f"{step.name}.*/{folder.name}"))
        earlier = ledgers_in(aside, _LEDGER)
        path = folder / f"{_LEDGER}{SUFFIX}"
        return cls(concurrency, path, earlier, run.progress, run.stopping)


@dataclass(frozen=True)
class Replies:
    """The judge's replies."""

    texts: Sequence[str | None]
    """One for each question, without the judge's thinking. None if the service refuses the request,
    or if it is not clear where the thinking ends."""
    usd: float | None
    """What they cost, in this attempt or an earlier one; None if no price is known."""

    def metrics(self) -> dict[str, float]:
        """Return the price as a metric of a benchmark, if it is known."""
        return {} if self.usd is None else {"judge_usd": self.usd}


def replies(
    judge: ChatModel,
    questions: Sequence[Sequence[Message]],
    labels: Sequence[str],
    settings: JudgeSettings,
) -> Replies:
    """Return the judge's reply to each question; `labels` name the questions in the ledger.

    Raises ChatError if the service cannot be used, or if some questions have no answer yet, because
    a score without them would look like a score of all. Raises Stopped if the user asked to stop.
    The replies so far are kept.
    """
    requests = [
        Request(tuple(messages), label=label)
        for messages, label in zip(questions, labels, strict=True)
    ]
    with ExitStack() as stack:
        path = settings.ledger
        if path is None:
            # without a ledger of the user's, replies still pass one, for retries and budgets
            path = Path(stack.enter_context(TemporaryDirectory())) / f"{_LEDGER}{SUFFIX}"
        ledger = stack.enter_context(
            Ledger(path, identity=judge.identity, earlier=settings.earlier)
        )
        # equal questions have equal keys: they are sent once, and share the reply
        keys = [record_of(judge.identity, request).key for request in requests]
        wanted = set(keys)
        done = sum(key in ledger for key in wanted)

        def show(entry: Entry) -> None:
            nonlocal done
            done += 1
            usd = "" if ledger.usd is None else f", {ledger.usd:.2f} USD"
            settings.progress(done, len(wanted), f"asking the judge{usd}")

        tally = send_all(
            judge,
            lambda: requests,
            ledger,
            concurrency=settings.concurrency,
            stopping=settings.stopping,
            progress=show,
        )
        found = [ledger.get(key) for key in keys]
        own = {key: entry.usd for key, entry in zip(keys, found, strict=True) if entry is not None}
    # a request that the service refuses for good will not be answered later, and blocks no score
    silent = [key for key in tally.unanswered if key not in tally.refused]
    if silent:
        names = [label for key, label in zip(keys, labels, strict=True) if key in silent]
        raise ChatError(
            f"the judge left {len(silent)} of {len(wanted)} questions without an answer "
            f"({listed(names)}); what it answered is kept. The last: {tally.unanswered[silent[-1]]}"
        )
    prices = [usd for usd in own.values() if usd is not None]
    texts = [None if entry is None else without_thinking(entry.text) for entry in found]
    return Replies(texts, sum(prices) if prices else None)
