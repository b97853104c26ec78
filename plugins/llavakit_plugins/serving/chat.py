"""Answers `/v1/chat/completions`: a body becomes a job of the scheduler, its pieces an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive, Scope

from llavakit.contracts.errors import LlavaError
from llavakit_plugins.serving.errors import Gone, RequestError
from llavakit_plugins.serving.http import Answer, Bodies, again, left
from llavakit_plugins.serving.limits import Limits
from llavakit_plugins.serving.metrics import Metrics
from llavakit_plugins.serving.preparing import Prepared
from llavakit_plugins.serving.responses import DONE, Completion, Usage, error_event
from llavakit_plugins.serving.scheduler import Full, Job, Scheduler, Update
from llavakit_plugins.serving.writing import Piece

_EVENTS = "text/event-stream; charset=utf-8"


@dataclass(eq=False)
class Inbox:
    """What has come for one request, and was not sent yet."""

    updates: list[tuple[int, Piece | BaseException]] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False  #: Whether the client left, or the server stops.

    def close(self, _: object = None) -> None:
        self.closed = True
        self.ready.set()


def deliver(updates: list[Update]) -> None:
    """Put what a turn of the scheduler brought into the inboxes; in the event loop's thread."""
    for job, index, what in updates:
        job.inbox.updates.append((index, what))
        job.inbox.ready.set()


class Chat:
    """The endpoint. `prepare` turns a body into a request, in a thread."""

    def __init__(
        self,
        prepare: Callable[[bytes], Prepared],
        scheduler: Scheduler,
        *,
        name: str,
        spell: Callable[[int], str],
        limits: Limits,
        bodies: Bodies,
        pool: Executor,
        metrics: Metrics,
    ) -> None:
        self._prepare, self._scheduler, self._name, self._spell = prepare, scheduler, name, spell
        self._limits, self._bodies, self._pool, self._metrics = limits, bodies, pool, metrics
        self.inboxes: set[Inbox] = set()

    async def __call__(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        begun = time.monotonic()
        async with self._bodies.read(scope, receive) as body:
            if not self._scheduler.alive:
                raise RequestError(503, "the model's thread has ended; restart the server")
            # asked before the images are decoded, which costs most;
            # `submit` decides, as others come meanwhile
            if self._scheduler.full:
                raise self._full()
            loop = asyncio.get_running_loop()
            prepared = await loop.run_in_executor(self._pool, self._prepare, body)
        inbox = Inbox()
        job = Job(prepared.prompt, prepared.choices, inbox)
        try:
            self._scheduler.submit(job)
        except Full:
            raise self._full() from None
        self._metrics.count("images_total", prepared.prompt.encoded.image_count)
        # while the model writes nothing is sent,
        # and a client that has gone would not be noticed otherwise
        watching = asyncio.create_task(left(receive))
        watching.add_done_callback(inbox.close)
        self.inboxes.add(inbox)
        usage = Usage(prepared.prompt.length)
        completion = Completion(self._name, self._spell)
        try:
            async with asyncio.timeout(self._limits.seconds):
                if prepared.request.stream:
                    await self._stream(answer, completion, prepared, inbox, usage)
                else:
                    await self._whole(answer, completion, prepared, inbox, usage)
        except TimeoutError:
            error = RequestError(504, f"the answer took longer than {self._limits.seconds:g} s")
            if not answer.begun:
                raise error from None
            await answer.part(error_event(error.body), more=False)
        finally:
            # in every case: after an end it does nothing, and after an error it frees the places
            self._scheduler.drop(job)
            self.inboxes.discard(inbox)
            watching.remove_done_callback(inbox.close)
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            self._metrics.time("request_seconds", time.monotonic() - begun)

    async def _whole(
        self,
        answer: Answer,
        completion: Completion,
        prepared: Prepared,
        inbox: Inbox,
        usage: Usage,
    ) -> None:
        found: list[list[Piece]] = [[] for _ in prepared.choices]
        async for pieces in _pieces(inbox, len(found)):
            for index, some in pieces.items():
                found[index] += some
        usage.completion = sum(map(len, found))
        logprobs = bool(prepared.request.logprobs)
        await answer.whole(200, completion.whole(found, usage, logprobs))

    async def _stream(
        self,
        answer: Answer,
        completion: Completion,
        prepared: Prepared,
        inbox: Inbox,
        usage: Usage,
    ) -> None:
        options = prepared.request.stream_options
        counts = options is not None and options.include_usage
        more: dict[str, Any] = {"usage": None} if counts else {}
        logprobs = bool(prepared.request.logprobs)
        try:
            async for pieces in _pieces(inbox, len(prepared.choices)):
                if not answer.begun:
                    await answer.begin(200, _EVENTS, {"x-accel-buffering": "no"})
                    for index in range(len(prepared.choices)):
                        await answer.part(completion.begin(index, more))
                # the pieces of all choices in one write, as a step gives one to each
                events = b""
                for index, some in pieces.items():
                    usage.completion += len(some)
                    events += completion.event(index, some, more, logprobs)
                if events:
                    await answer.part(events)
        except RequestError as error:
            if not answer.begun:
                raise
            await answer.part(error_event(error.body), more=False)
            return
        await answer.part((completion.end(usage) if counts else b"") + DONE, more=False)

    def _full(self) -> RequestError:
        return RequestError(
            429,
            f"{self._limits.queue} requests wait already; try again later",
            code="rate_limit_exceeded",
            headers=again(self._metrics.mean("request_seconds")),
        )


async def _pieces(inbox: Inbox, choices: int) -> AsyncIterator[dict[int, list[Piece]]]:
    """Yield what comes, by choice, until every choice has ended.

    Raises Gone where the client left, RequestError where the model cannot answer.
    """
    going = choices
    while going:
        await inbox.ready.wait()
        inbox.ready.clear()
        updates, inbox.updates = inbox.updates, []
        found: dict[int, list[Piece]] = {}
        for index, what in updates:
            if not isinstance(what, Piece):
                raise _refused(what)
            found.setdefault(index, []).append(what)
            going -= what.finish is not None
        # only after the updates are looked at: an answer that is complete is sent all the same
        if inbox.closed and going:
            raise Gone
        if found:
            yield found


def _refused(error: BaseException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, LlavaError):
        return RequestError(400, str(error))
    return RequestError(500, "the model failed; the server's log says why")
