"""Runs a job: sends requests until each item has a usable reply or no attempt left; then writes
the data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llavakit import ChatError, DataError, LlavaError, Outcome, Run, Stopped
from llavakit_plugins.generation.conversations import Failures, ledgers_to_join
from llavakit_plugins.generation.items import Items
from llavakit_plugins.generation.output import price_of, write_output
from llavakit_plugins.generation.requests.ledger import (
    SUFFIX,
    Entry,
    Ledger,
    Request,
    ledgers_in,
)
from llavakit_plugins.generation.requests.prompted import PromptedGenerator
from llavakit_plugins.generation.requests.send_all import send_all
from llavakit_plugins.generation.review import Review
from llavakit_plugins.generation.sources import open_sources

if TYPE_CHECKING:
    from llavakit_plugins.generation.contexts import Contexts
    from llavakit_plugins.generation.options import GenerateOptions

LEDGER = "ledger"
_LOOK = 256  # items between checks whether the user asked to stop
_EVERY = 15.0  # seconds between events about the cost


Jobs = Sequence[tuple[str, "Contexts", Items]]


def run_job(options: GenerateOptions, generator: PromptedGenerator, run: Run) -> Outcome:
    """Write the data, their provenance, the rejected replies, and a page to review them.

    Raises ChatError if the service cannot be used or requests have no answer yet, DataError if no
    conversation can be used, and Stopped if the user asked to stop. Replies are kept in all cases.
    """
    failures = Failures(generator.name, run.directory / "failures.txt")
    generator.images = options.images
    with open_sources(options, run.directory, shown=generator.shows_images) as sources:
        jobs = []
        for name, contexts in sources.items():
            counts = options.counts if not name else {}
            items = Items(
                contexts, options.kinds, counts, generator, options.attempts, run.seed, failures,
                options.share(len(contexts)),
            )  # fmt: skip
            jobs.append((name, contexts, items))
        identity, earlier = generator.chat.identity, earlier_ledgers(run.directory, options)
        path = run.directory / f"{LEDGER}{SUFFIX}"
        with Ledger(path, identity=identity, earlier=earlier) as ledger:
            return _work_off(options, generator, run, ledger, jobs, failures)


def _work_off(
    options: GenerateOptions,
    generator: PromptedGenerator,
    run: Run,
    ledger: Ledger,
    jobs: Jobs,
    failures: Failures,
) -> Outcome:
    unanswered = Unanswered()
    review = Review(options.images, run.seed)
    if len(ledger):  # tell the user at once that these are not paid for again
        run.progress(0, total_of(jobs), f"{len(ledger)} replies are here already")
    try:
        for name, _, items in jobs:
            _ask(options, generator, run, ledger, items, name, unanswered)
        if failures.errors:
            raise failures.complaint(total_of(jobs))
        if not len(ledger) and unanswered.reasons:
            raise unanswered.complaint(total_of(jobs))
    except (LlavaError, Stopped):
        if len(ledger) or failures.errors:  # write what there is, for the user to look at
            run.event("asked", **totals(ledger))
            write_output(jobs, ledger, unanswered.reasons, review, run)
        else:
            ledger.discard()
        raise
    return finish(jobs, ledger, unanswered, review, run)


def finish(jobs: Jobs, ledger: Ledger, unanswered: Unanswered, review: Review, run: Run) -> Outcome:
    """Write everything and return the outcome. Raises LlavaError if the step is not complete."""
    outcome = write_output(jobs, ledger, unanswered.reasons, review, run)
    total = total_of(jobs)
    if unanswered.passing:
        raise unanswered.complaint(total)
    if total and not outcome.metrics["samples"]:
        raise DataError(
            f"of {total} conversations none can be used; see {run.directory / 'review.html'}, and "
            "change the prompts, the chat model or `attempts`"
        )
    return outcome


def total_of(jobs: Jobs) -> int:
    """Return the number of conversations of all jobs."""
    return sum(len(items) for _, _, items in jobs)


@dataclass
class Unanswered:
    """The requests without a reply."""

    reasons: dict[str, str] = field(default_factory=dict)
    """Why there is no reply, by key."""
    refused: set[str] = field(default_factory=set)
    """Keys of requests that will never get a reply."""

    @property
    def passing(self) -> list[str]:
        """Keys of requests that may get a reply later, the newest last."""
        return [key for key in self.reasons if key not in self.refused]

    def complaint(self, total: int) -> ChatError:
        """Return the error of a step that cannot be completed without these replies."""
        if not self.passing:
            return ChatError(
                f"the service refuses all of {total} requests; the last: "
                f"{list(self.reasons.values())[-1]}"
            )
        return ChatError(
            f"{len(self.passing)} of {total} requests have no answer for now; run again with "
            f"--resume, which asks these alone. The last: {self.reasons[self.passing[-1]]}"
        )


class Spending:
    """Reports the cost from time to time."""

    def __init__(self, run: Run, ledger: Ledger) -> None:
        self._run, self._ledger = run, ledger
        # so that the first reply is recorded at once
        self._said = time.monotonic() - _EVERY

    def show(self, done: int, total: int, name: str) -> None:
        """Show the progress; record the cost if that was not done for 15 seconds."""
        self._run.progress(done, total, f"{name} {price_of(self._ledger)}".strip())
        if len(self._ledger) and time.monotonic() - self._said >= _EVERY:
            self.note()

    def note(self) -> None:
        """Record the cost as an event."""
        self._said = time.monotonic()
        self._run.event("asked", **totals(self._ledger))


def _ask(
    options: GenerateOptions,
    generator: PromptedGenerator,
    run: Run,
    ledger: Ledger,
    items: Items,
    name: str,
    unanswered: Unanswered,
) -> None:
    """Send requests until all open items are those that get no reply.

    Each round sends the next draw of all items whose reply was rejected in the round before.
    """
    spending = Spending(run, ledger)
    at = 0  # number of the item whose request was sent last

    def requests() -> Iterator[Request]:
        nonlocal at
        for at, item in enumerate(items.walk(ledger), start=1):
            # most items may be answered already, and then no new entry shows the progress
            if at % _LOOK == 0:
                if run.stopping():
                    raise Stopped
                show()
            if item.open and item.record.key not in unanswered.refused:
                yield item.request

    def show(entry: Entry | None = None) -> None:
        spending.show(at, len(items), name)

    while True:
        tally = send_all(
            generator.chat,
            requests,
            ledger,
            concurrency=options.concurrency,
            budget_usd=options.budget_usd,
            stopping=run.stopping,
            progress=show,
        )
        refused = {key: why for key, why in tally.unanswered.items() if key in tally.refused}
        unanswered.refused |= tally.refused
        unanswered.reasons |= refused
        # nothing new came, so that another round would send the same requests again
        if tally.answered == 0:
            unanswered.reasons |= tally.unanswered
            spending.note()
            return


def totals(ledger: Ledger) -> dict[str, float | int | None]:
    """Return the totals of replies, tokens and cost, with the names they have in events."""
    return {
        "replies": len(ledger),
        "input_tokens": ledger.input_tokens,
        "output_tokens": ledger.output_tokens,
        "usd": None if ledger.usd is None else round(ledger.usd, 6),
    }


def earlier_ledgers(folder: Path, options: GenerateOptions) -> list[Path]:
    """Return the ledgers of attempts that were set aside, and of shares: their replies are paid
    for, so they are used again."""
    return [
        *ledgers_in(sorted((folder.parent / "superseded").glob(f"{folder.name}.*")), LEDGER),
        *ledgers_to_join(options, LEDGER),
    ]
