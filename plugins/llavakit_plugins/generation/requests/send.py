"""Sends many requests to a chat model at once: none twice, no reply lost, never beyond a budget."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)  # fmt: skip
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llavakit import ChatError, ChatModel, LlavaError, Message, Reply, ReplyError, Stopped, shown
from llavakit_plugins.generation.requests.booking import most_of, priced
from llavakit_plugins.generation.requests.ledger import (
    Entry,
    Ledger,
    Request,
    RequestRecord,
    record_of,
)

_PATIENCE = 10  # requests in a row without an answer before the job stops
_GRACE = 120.0  # seconds that a stopping job waits for requests in flight: they are paid for
_WRITING = 0.25  # extra workers, as a share of the concurrency, for replies being written to disk
LOOK = 0.5  # seconds between checks whether the user asked to stop
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Tally:
    """The outcome of a job's requests."""

    answered: int = 0
    """Requests answered in this job, without those that were in the ledger before."""
    unanswered: dict[str, str] = field(default_factory=dict)
    """Why requests got no reply, by key."""
    refused: set[str] = field(default_factory=set)
    """Keys of the unanswered requests that will never get a reply."""


class Sender:
    """Sends requests to one or more chat models that share a ledger and a budget."""

    def __init__(
        self,
        chats: Sequence[ChatModel],
        ledger: Ledger,
        budget: float | None,
        stopping: Callable[[], bool],
        progress: Callable[[Entry], None],
    ) -> None:
        self.chats, self._ledger, self._budget = chats, ledger, budget
        self._stopping, self._progress = stopping, progress
        self.tally = Tally()
        self._in_flight: set[str] = set()
        """Keys of requests that are being sent one by one."""
        self._slots = asyncio.Semaphore(1)
        self._reservations = 0
        self._reserved = 0.0
        """Most that the requests in flight may cost, in USD."""
        self._failed_in_a_row = 0
        self._end: Exception | None = None
        """Why no further request is sent; None while the job goes on."""

    # -- one by one --------------------------------------------------------------------------------

    async def live(self, requests: Iterable[Request], concurrency: int) -> None:
        """Send the missing requests one by one to the only chat model."""
        todo = self._missing(requests, self._begin)

        async def send(item: tuple[RequestRecord, Request]) -> None:
            record, request = item
            try:
                await self.send(self.chats[0], record, request)
            except ReplyError:
                pass  # it is in the tally
            finally:
                self._in_flight.discard(record.key)

        await self.work_off(todo, send, concurrency)

    async def work_off(
        self, todo: Iterator[T], work: Callable[[T], Awaitable[None]], concurrency: int
    ) -> None:
        """Run `work` on every item, many at a time; raise the reason if the job ends early."""
        # the first item alone: a wrong key or model fails once and not `concurrency` times
        await self._watch([self._work(todo, work, most=1)])
        self._slots = asyncio.Semaphore(concurrency)
        # more workers than slots: while one writes its reply to disk, another one sends
        workers = concurrency + math.ceil(concurrency * _WRITING)
        await self._watch([self._work(todo, work) for _ in range(workers)])

    async def _watch(self, work: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Wait until all are done; if the job ends early, wait for requests in flight and raise."""
        workers = [asyncio.create_task(one) for one in work]
        running = set(workers)
        try:
            while running and self._end is None:
                done, running = await asyncio.wait(
                    running, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED
                )
                for worker in done:
                    worker.result()
                if self._end is None and self._stopping():
                    self._end = Stopped()
            if running:
                for chat in self.chats:
                    chat.halt()  # drops requests that wait for a slot or a retry: they cost nothing
                done, running = await asyncio.wait(running, timeout=_GRACE)
                for worker in done:
                    worker.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self._end is not None:
            raise self._end

    def _missing(
        self, requests: Iterable[Request], is_new: Callable[[RequestRecord], bool]
    ) -> Iterator[tuple[RequestRecord, Request]]:
        for request in requests:
            record = record_of(self.chats[0].identity, request)
            known = record.key in self._ledger or record.key in self.tally.refused
            if not known and is_new(record):
                yield record, request

    def _begin(self, record: RequestRecord) -> bool:
        """Note that a request is being sent; False where it is already."""
        new = record.key not in self._in_flight
        self._in_flight.add(record.key)
        return new

    async def _work(
        self, todo: Iterator[T], work: Callable[[T], Awaitable[None]], most: int | None = None
    ) -> None:
        taken = 0
        while self._end is None and (most is None or taken < most):
            try:
                item = next(todo, None)
                if item is None:
                    return
                taken += 1
                await work(item)
            except Exception as error:  # a ChatError or a full disk: the others finish their item
                self.end(error)

    def end(self, error: Exception) -> None:
        """Send no further request; `error` is the reason. The first reason counts."""
        self._end = self._end or error

    async def send(self, chat: ChatModel, record: RequestRecord, request: Request) -> None:
        """Send a request and write its reply to the ledger.

        Raises ReplyError if there is no reply, and the reason if the job has ended.
        """
        try:
            async with self._reserving(chat, request):
                async with self._slots:
                    if self._end is not None:
                        raise self._end
                    reply = await self._reply(chat, request)
                self._failed_in_a_row = 0
                entry = record.entry(priced(chat, request, reply))
                await self._ledger.write(entry)
        except ReplyError as error:
            self._no_answer(record.key, error)
            raise
        self._count(entry)

    async def _reply(self, chat: ChatModel, request: Request) -> Reply:
        """Return the chat model's reply.

        Raises ReplyError for any unknown error of a chat model: a plugin's bug in one request must
        not end the job.
        """
        try:
            reply: Any = await chat.reply(request.messages, request.draw)
            if not isinstance(reply, Reply) or not isinstance(reply.text, str):
                raise TypeError(f"`reply` gives {type(reply).__name__}, not a Reply with a text")
        except (LlavaError, Stopped):
            raise
        except Exception as error:
            _log.debug("chat model `%s`", chat.name, exc_info=True)
            said = shown(f"{type(error).__name__}: {error}")
            raise ReplyError(f"chat model `{chat.name}` failed: {said}") from error
        return reply

    @asynccontextmanager
    async def _reserving(self, chat: ChatModel, request: Request) -> AsyncIterator[None]:
        """Reserve the most that a request may cost until its price is in the ledger."""
        most = self._most(chat, request.messages)
        while not self._affordable(self._reserved + most) and self._end is None:
            if self._reservations == 0:
                self._end = self._too_little(most)
            # wait: requests in flight usually cost less than was reserved for them
            await asyncio.sleep(0.02)
        self._reservations += 1
        self._reserved += most
        try:
            yield
        finally:
            self._reservations -= 1
            # exactly 0 when nothing is in flight: sums of floats leave a remainder
            self._reserved = self._reserved - most if self._reservations else 0.0

    def _unanswered(self, key: str, error: ReplyError) -> None:
        self.tally.unanswered[key] = str(error)
        if error.lasting:
            self.tally.refused.add(key)

    def _no_answer(self, key: str, error: ReplyError) -> None:
        self._unanswered(key, error)
        # a lasting refusal concerns one request; the service works if it has answered before
        self._failed_in_a_row += not (error.lasting and len(self._ledger))
        if self._failed_in_a_row >= _PATIENCE and self._end is None:
            self._end = ChatError(
                f"{self._failed_in_a_row} requests in a row got no answer; the last: {error}"
            )

    def _count(self, entry: Entry) -> None:
        self.tally.answered += 1
        self._progress(entry)

    # -- money -------------------------------------------------------------------------------------

    def _most(self, chat: ChatModel, messages: tuple[Message, ...]) -> float:
        """Return the most that a request may cost, in USD; 0 without a budget."""
        if self._budget is None:
            return 0.0
        return most_of(chat, messages)

    def _affordable(self, usd: float) -> bool:
        return self._budget is None or self._ledger.spent + usd <= self._budget

    def _too_little(self, most: float) -> ChatError:
        return ChatError(
            f"stopped at budget_usd = {self._budget:g}: {self._ledger.spent:.4f} USD are spent, "
            f"and the next request may cost {most:.4f}; {len(self._ledger)} replies are in "
            f"{self._ledger.path}; raise `budget_usd` and run again, nothing is asked twice"
        )
