"""Where generators that ask chat models in a way of their own get their replies: from the ledger
if they are there, else within the budget, at the rates, and after retries, as any job's.

A generator is built with `Desk.building`; the chat models that it is given then ask at the desk.
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
from llavakit_plugins.generation.requests.ledger import Ledger, Request, hash_messages, record_of
from llavakit_plugins.generation.requests.send import Sender

_NEXT = 1000
"""Between the draws of one attempt, which may ask the same thing more than once."""
ItemT = TypeVar("ItemT")


class EmptyReply(ReplyError):
    """A reply without a text; it is paid for, and another attempt may give one."""


@dataclass
class _Scope:
    """One attempt at one conversation."""

    attempt: int
    label: str
    times: Counter[str] = field(default_factory=Counter)
    """How often it has asked each thing."""
    lock: Lock = field(default_factory=Lock)


_scope: ContextVar[_Scope | None] = ContextVar("_scope", default=None)


@contextmanager
def attempt(number: int, label: str) -> Iterator[None]:
    """Number what is asked within the block, so that another attempt gets other replies."""
    token = _scope.set(_Scope(number, label))
    try:
        yield
    finally:
        _scope.reset(token)


class Desk:
    """Takes what generators ask, from whatever thread."""

    def __init__(self) -> None:
        self.chats: list[ChatModel] = []
        """Every chat model that was built with `building`."""
        self._built: dict[str, ChatModel] = {}
        self._sender: Sender | None = None
        self._ledger: Ledger | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._in_flight: dict[str, asyncio.Task[None]] = {}

    def building(self, build: Build) -> Build:
        """Return a `build` whose chat models ask here."""

        def inner(use: Use[Any], /, **context: Any) -> Any:
            if not issubclass(kind_of(use), ChatModel):
                return build(use, build=inner, **context)
            choice = use.model_dump_json()
            if choice not in self._built:  # who builds one for each conversation gets one for all
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
        """Do `work` for every item, in threads, and `after` with what it gives, in one.

        Raises what ends the job early, when what is on its way has come.
        """

        async def run() -> None:
            self._sender, self._ledger = sender, ledger
            self._loop = loop = asyncio.get_running_loop()
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

    @property
    def open(self) -> bool:
        """Whether a job has begun here: what is asked before is none of its."""
        return self._loop is not None

    def ask(self, chat: ChatModel, messages: Sequence[Message], draw: int | None = None) -> Reply:
        """Return a reply; wait for it. Raises ReplyError where this request gets none."""
        scope = _scope.get()
        number, label = 0 if scope is None else scope.attempt, "" if scope is None else scope.label
        if draw is None and scope is not None:
            prompt = f"{chat.identity} {hash_messages(messages)}"
            with scope.lock:
                draw = scope.times[prompt]
                scope.times[prompt] += 1
        request = Request(tuple(messages), number + _NEXT * (draw or 0), label)
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
            task = self._in_flight.get(record.key)
            if task is None:
                task = asyncio.create_task(self._sender.send(chat, record, request))
                self._in_flight[record.key] = task
                task.add_done_callback(lambda _: self._in_flight.pop(record.key, None))
            try:
                await asyncio.shield(task)
            except ReplyError:
                raise
            except Exception as error:
                self._sender.end(error)  # the generator may make light of it
                raise
        entry = self._ledger.get(record.key)
        assert entry is not None
        return entry.reply


class AtDesk(ChatModel):
    """A chat model as a generator sees it within a job."""

    def __init__(self, inner: ChatModel, desk: Desk) -> None:
        super().__init__(getattr(inner, "options", None))
        self.inner, self._desk = inner, desk
        self.reply_limit = inner.reply_limit

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # of a copy that has none yet
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
        return reply.text

    async def reply(self, messages: Sequence[Message], draw: int = 0) -> Reply:
        if not self._desk.open:
            return await self.inner.reply(messages, draw)
        return await asyncio.to_thread(self._desk.ask, self.inner, messages, draw)

    def halt(self) -> None:
        self.inner.halt()

    def count(self, messages: Sequence[Message]) -> int:
        return self.inner.count(messages)

    def price(self, input_tokens: int, output_tokens: int) -> float | None:
        return self.inner.price(input_tokens, output_tokens)

    async def close(self) -> None:
        if not self._desk.open:  # within a job its connections are the job's
            await self.inner.close()
