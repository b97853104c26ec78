"""Sends requests to a batch service: in batches as large as it takes, none twice, no reply lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict
from typing import Any

from llavakit import ChatError, ChatModel, Reply, ReplyError, Stopped
from llavakit_plugins.generation.requests.batches import BatchService, SendAgain
from llavakit_plugins.generation.requests.journal import Journal
from llavakit_plugins.generation.requests.ledger import Entry, Ledger, Request, RequestRecord
from llavakit_plugins.generation.requests.send import LOOK, Sender, Tally
from llavakit_plugins.generation.requests.shelf import Shelf

_TOGETHER = 500  # replies of a batch that are written with one fsync


def send_all(
    chat: ChatModel,
    requests: Callable[[], Iterable[Request]],
    ledger: Ledger,
    *,
    concurrency: int = 8,
    budget_usd: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[Entry], None] = lambda entry: None,
) -> Tally:
    """Send the requests that are not in the ledger yet; afterwards their replies are in the ledger.

    `requests` returns the requests and may be called several times. They are taken one by one, so
    that they are never in memory together; it may raise Stopped. At most `concurrency` requests are
    in flight. `progress` gets every new entry. With `budget_usd`, no request is sent that could
    raise `ledger.spent` above it.

    Raises ChatError if the service cannot be used or the budget is too small, and Stopped if the
    user asked to stop. In all cases the replies so far are kept.
    """
    sender = BatchSender([chat], ledger, budget_usd, stopping, progress)
    service: BatchService | None = getattr(chat, "batches", None)

    async def run() -> None:
        try:
            if service is not None:
                await sender.in_batches(service, requests)
            else:
                await sender.live(requests(), concurrency)
        finally:
            await chat.close()

    asyncio.run(run())
    return sender.tally


class BatchSender(Sender):
    """A sender of one chat model, which may have a batch service."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._again, self._may_send_again = False, True
        """Whether a batch has requests to send again in another form; and whether that is allowed,
        once per job."""

    async def in_batches(
        self, service: BatchService, requests: Callable[[], Iterable[Request]]
    ) -> None:
        journal = Journal.beside(self._ledger)
        # batches of earlier attempts first, so that their requests are not submitted again
        running = [
            batch
            for mark in journal.marks
            for batch in await service.find(mark)
            if batch not in journal.collected
        ]
        if running:
            with closing(Shelf()) as known:
                for _ in self._missing(requests(), lambda record: _note(known, record)):
                    pass
                await self._collect(service, journal, running, known)
        for self._may_send_again in (True, False):
            self._again = False
            with closing(Shelf()) as known:
                await self._submit(service, requests, journal, known)
            if self._end is not None:
                raise self._end
            if not self._again:
                return

    async def _submit(
        self,
        service: BatchService,
        requests: Callable[[], Iterable[Request]],
        journal: Journal,
        known: Shelf,
    ) -> None:
        """Submit the missing requests in batches, and wait for their replies."""
        self._reserved = 0.0
        running: list[str] = []
        draft = service.draft()

        async def submit() -> None:
            if service.at_once is not None:
                await self._collect(service, journal, running, known, service.at_once - 1)
            running.append(await service.submit(journal.mark, draft))

        try:
            for record, request in self._missing(requests(), lambda new: _note(known, new)):
                most = self._most(self.chats[0], request.messages)
                if not self._affordable(self._reserved + most):
                    self._end = self._too_little(most)
                    break
                self._reserved += most
                try:
                    if not draft.add(record.key, request):
                        await submit()
                        draft.close()
                        draft = service.draft()
                        draft.add(record.key, request)
                except ReplyError as error:
                    self._unanswered(record.key, error)
            if len(draft):
                await submit()
        finally:
            draft.close()
        await self._collect(service, journal, running, known)
        for key in map(bytes.hex, known):
            if key not in self._ledger and not self._again:
                self.tally.unanswered.setdefault(key, "the batch has no line for it")

    async def _collect(
        self,
        service: BatchService,
        journal: Journal,
        running: list[str],
        known: Shelf,
        most: int = 0,
    ) -> None:
        """Take the replies of batches that have ended, until `most` of them are on their way."""
        while len(running) > most:
            for batch in list(running):
                state = await service.state(batch)
                if not state.done:
                    continue
                fresh: list[Entry] = []
                async for key, reply in service.collect(batch):
                    fresh += self._taken(key, reply, known)
                    if len(fresh) >= _TOGETHER:
                        await self._keep(fresh)
                await self._keep(fresh)
                journal.note_collected(batch)
                running.remove(batch)
                if state.status == "failed":
                    raise ChatError(f"the service refused batch {batch}: {state.complaint}")
            if len(running) > most:
                await self._pause(service.poll_seconds)

    def _taken(self, key: str, reply: Reply | ReplyError, known: Shelf) -> list[Entry]:
        """Return the entry of a reply, where it is one that is not in the ledger."""
        if isinstance(reply, SendAgain) and self._may_send_again:
            self._again = True
        elif isinstance(reply, ReplyError):
            self._unanswered(key, reply)
        elif key not in self._ledger:
            return [_noted(known, key).entry(reply)]
        return []

    async def _keep(self, fresh: list[Entry]) -> None:
        """Write entries to the disk together: an fsync for each would take most of the time."""
        await asyncio.to_thread(self._ledger.append, *fresh)
        for entry in fresh:
            self._count(entry)
        fresh.clear()

    async def _pause(self, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while (left := end - asyncio.get_running_loop().time()) > 0:
            if self._stopping():
                raise Stopped  # the service keeps running the batches; a resume collects them
            await asyncio.sleep(min(left, LOOK))


def _note(shelf: Shelf, record: RequestRecord) -> bool:
    """Keep a record until its reply comes; False where it is kept already."""
    return shelf.add(bytes.fromhex(record.key), json.dumps(asdict(record)))


def _noted(shelf: Shelf, key: str) -> RequestRecord:
    """Return the record of a key; that of a request of an earlier recipe is not known."""
    found = shelf.get(bytes.fromhex(key))
    if found is None:
        return RequestRecord(key, "", "", 0, "of an earlier recipe")
    return RequestRecord(**json.loads(found))
