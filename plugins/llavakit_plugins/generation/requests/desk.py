"""Lets generators call chat models in their own way, under the rules of any other job.

A reply comes from the ledger if it is there. Otherwise the request is sent within the budget and
the rate limits, and with retries. A generator is built with `Desk.building`; the chat models that
it gets then send their requests through the desk.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar, cast

from llavakit import Build, ChatError, ChatModel, Message, Reply, ReplyError, Use, kind_of
from llavakit.contracts.data import is_cut
from llavakit_plugins.generation.requests.ledger import Ledger, Request, hash_messages, record_of
from llavakit_plugins.generation.requests.rounds import Round
from llavakit_plugins.generation.requests.send import Sender

_NEXT = 1000
"""Distance between the draws of one attempt, which may send the same request several times."""
ItemT = TypeVar("ItemT")


class EmptyReply(ReplyError):
    """A reply without text, or with half a character. It is paid for; another attempt may do."""


@dataclass
class _Scope:
    """One attempt at one conversation, as the thread that makes it knows it."""

    attempt: int
    label: str
    times: Counter[str] = field(default_factory=Counter)
    """How often the attempt has sent each request so far."""
    lock: Lock = field(default_factory=Lock)


_scope: ContextVar[_Scope | None] = ContextVar("_scope", default=None)


@contextmanager
def attempt(number: int, label: str) -> Iterator[None]:
    """Number the requests within the block, so that another attempt gets other replies.

    A context variable and not an argument: the generator's own code stands between.
    """
    token = _scope.set(_Scope(number, label))
    try:
        yield
    finally:
        _scope.reset(token)


class Desk:
    """Takes the requests of generators, from any thread, and runs them in one event loop."""

    def __init__(self) -> None:
        self.chats: list[ChatModel] = []
        """Every chat model that was built with `building`."""
        self._built: dict[str, ChatModel] = {}
        self._sender: Sender | None = None
        self._ledger: Ledger | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._round: Round | None = None
        self._in_flight: dict[str, asyncio.Task[None]] = {}

    def building(self, build: Build) -> Build:
        """Return a `build` function whose chat models send their requests through this desk."""

        def inner(use: Use[Any], /, **context: Any) -> Any:
            if not issubclass(kind_of(use), ChatModel):
                return build(use, build=inner, **context)
            choice = use.model_dump_json()
            # a generator may build a chat model for each conversation: they share one, and so its
            # connections and rate limits
            if choice not in self._built:
                self._built[choice] = chat = build(use, **context)
                self.chats.append(chat)
            return AtDesk(self._built[choice], self)

        return cast("Build", inner)

    def work_off(
        self,
        sender: Sender,
        ledger: Ledger,
        todo: Iterator[ItemT],
        work: Callable[[ItemT], object],
        after: Callable[[Any], Awaitable[None]],
        concurrency: int,
    ) -> None:
        """Run `work` on every item, in threads, and `after` on each result, in one thread.

        Raises the error that ends the job early, after the requests in flight have come back.
        """

        async def run() -> None:
            self._sender, self._ledger = sender, ledger
            self._loop = loop = asyncio.get_running_loop()
            # twice as many threads as requests: some generators compute while others wait
            pool = ThreadPoolExecutor(2 * concurrency, "generator")

            async def one(item: ItemT) -> None:
                await after(await loop.run_in_executor(pool, copy_context().run, work, item))

            try:
                await sender.work_off(todo, one, concurrency)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for chat in self.chats:
                    await chat.close()

        asyncio.run(run())

    @contextmanager
    def answering_by(self, own: Round) -> Iterator[None]:
        """Within the block nothing is sent: `own` answers."""
        self._round = own
        try:
            yield
        finally:
            self._round = None

    @property
    def at_once(self) -> bool:
        """Whether `ask` does not wait."""
        return self._round is not None

    @property
    def open(self) -> bool:
        """Whether a job has started. Requests before that do not belong to it."""
        return self._loop is not None or self.at_once

    def ask(self, chat: ChatModel, messages: Sequence[Message], draw: int | None = None) -> Reply:
        """Return the reply to a request; blocks the calling thread until it is there.

        Raises ReplyError if this request gets no reply, ChatError if the job has ended.
        """
        scope = _scope.get()
        number, label = 0 if scope is None else scope.attempt, "" if scope is None else scope.label
        if draw is None and scope is not None:
            prompt = f"{chat.identity} {hash_messages(messages)}"
            with scope.lock:
                draw = scope.times[prompt]
                scope.times[prompt] += 1
        request = Request(tuple(messages), number + _NEXT * (draw or 0), label)
        if self._round is not None:
            return self._round.reply(chat, request)
        assert self._loop is not None
        answer = self._answer(chat, request)
        try:
            return asyncio.run_coroutine_threadsafe(answer, self._loop).result()
        except RuntimeError as error:
            if not self._loop.is_closed():
                raise
            answer.close()
            raise ChatError("the job that this request belongs to has ended") from error

    async def _answer(self, chat: ChatModel, request: Request) -> Reply:
        assert self._sender is not None
        assert self._ledger is not None
        record = record_of(chat.identity, request)
        if record.key not in self._ledger:
            # two generators may send the same request at once: it is paid for only once
            task = self._in_flight.get(record.key)
            if task is None:
                task = asyncio.create_task(self._sender.send(chat, record, request))
                self._in_flight[record.key] = task
                task.add_done_callback(lambda _: self._in_flight.pop(record.key, None))
            try:
                # another waiter may still need it if this one is cancelled
                await asyncio.shield(task)
            except ReplyError:
                raise
            except Exception as error:
                self._sender.end(error)  # the generator may catch the error, but the job must end
                raise
        entry = self._ledger.get(record.key)
        assert entry is not None
        return entry.reply


class AtDesk(ChatModel):
    """A chat model as a generator sees it: before a job it is the model itself, then the desk."""

    def __init__(self, inner: ChatModel, desk: Desk) -> None:
        super().__init__(getattr(inner, "options", None))
        self.inner, self._desk = inner, desk
        self.reply_limit = inner.reply_limit

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # a copy in the making has no attributes yet: avoid endless recursion
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def identity(self) -> str:
        return self.inner.identity

    def complete(self, messages: Sequence[Message]) -> str:
        if not self._desk.open:
            return self.inner.complete(messages)
        reply = self._desk.ask(self.inner, messages)
        if not reply.text:
            raise EmptyReply(f"`{self.inner.name}` gives an empty reply ({reply.finish})")
        if is_cut(reply.text):  # no request and no file could hold it
            raise EmptyReply(f"`{self.inner.name}` gives half a character (a lone surrogate)")
        return reply.text

    async def reply(self, messages: Sequence[Message], draw: int = 0) -> Reply:
        if not self._desk.open:
            return await self.inner.reply(messages, draw)
        if self._desk.at_once:  # at once, so that the order of tasks decides their draws
            return self._desk.ask(self.inner, messages, draw)
        return await asyncio.to_thread(self._desk.ask, self.inner, messages, draw)

    def halt(self) -> None:
        self.inner.halt()

    def count(self, messages: Sequence[Message]) -> int:
        return self.inner.count(messages)

    def price(self, input_tokens: int, output_tokens: int) -> float | None:
        return self.inner.price(input_tokens, output_tokens)

    async def close(self) -> None:
        if not self._desk.open:  # during a job its connections belong to the job
            await self.inner.close()
