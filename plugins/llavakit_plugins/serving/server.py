"""Runs the server: its socket, its connections, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from llavakit import LlavaError, LlavaModel
from llavakit_plugins.serving.app import make_app
from llavakit_plugins.serving.batch import Batch
from llavakit_plugins.serving.chat import Chat, deliver
from llavakit_plugins.serving.errors import RequestError, on_one_line
from llavakit_plugins.serving.guard import Guard
from llavakit_plugins.serving.heatmap import Heatmap, has_heatmaps
from llavakit_plugins.serving.http import Bodies
from llavakit_plugins.serving.limits import Limits
from llavakit_plugins.serving.metrics import Metrics
from llavakit_plugins.serving.preparing import Preparer
from llavakit_plugins.serving.scheduler import Scheduler, Update
from llavakit_plugins.serving.writing import Voice

_log = logging.getLogger(__name__)
_HEAD_BYTES = 64 * 1024  # of a request's first line and headers


@dataclass(frozen=True)
class Serving:
    """What is served, and to whom."""

    model: Any
    name: str
    guard: Guard
    limits: Limits
    image_hosts: Sequence[str] = ()  #: From which images may be fetched.
    log_requests: bool = False  #: Whether what is asked may be logged.


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound. Raises LlavaError where it cannot be."""
    if not 0 <= port <= 65535:
        raise LlavaError(f"there is no port {port}; give --port 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise LlavaError(
            f"cannot listen on {host}, port {port}: {error.strerror}; "
            "choose another with --port, or --port 0 for any that is free"
        ) from None


def run(serving: Serving, listener: socket.socket, ready: Callable[[str], None]) -> int:
    """Serve until a signal comes; return the exit code. `ready` is called with the address."""
    server = Server(serving)
    return asyncio.run(server.run(listener, ready))


class Server:
    """One model, one thread for it, and an event loop for the clients."""

    def __init__(self, serving: Serving) -> None:
        self._limits = limits = serving.limits
        self.metrics = metrics = Metrics()
        model = serving.model
        batch, longest = _batch_of(model, limits)
        voice = Voice(model.tokenizer, model.end_ids)
        self.scheduler = Scheduler(
            batch,
            voice,
            places=limits.places,
            waiting=limits.queue,
            deliver=self._deliver,
            metrics=metrics,
        )
        self._pool = ThreadPoolExecutor(limits.workers, "prepare")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: _Http | None = None
        bodies = Bodies(limits)
        metrics.levels["bodies_bytes"] = lambda: bodies.held
        preparer = Preparer(
            model,
            voice,
            longest,
            name=serving.name,
            limits=limits,
            image_hosts=serving.image_hosts,
        )
        if serving.log_requests:
            preparer.seen = _log_sample
        self._chat = Chat(
            preparer,
            self.scheduler,
            name=serving.name,
            spell=voice.spell,
            limits=limits,
            bodies=bodies,
            pool=self._pool,
            metrics=metrics,
        )
        heatmap = None
        if has_heatmaps(model):
            heatmap = Heatmap(model, preparer, self.scheduler, bodies, self._pool)
        self._app = make_app(
            chat=self._chat,
            heatmap=heatmap,
            scheduler=self.scheduler,
            guard=serving.guard,
            name=serving.name,
            longest=longest,
            limits=limits,
            metrics=metrics,
            stopping=lambda: self._http is not None and self._http.should_exit,
        )

    async def run(self, listener: socket.socket, ready: Callable[[str], None]) -> int:
        """Serve on a socket until a signal or `stop`; return the exit code."""
        self._loop = asyncio.get_running_loop()
        self._http = http = _Http(self._app, self._limits, self._give_up)
        self.metrics.levels["connections"] = lambda: len(http.server_state.connections)
        self.scheduler.start()
        try:
            host, port = listener.getsockname()[:2]
            address = f"[{host}]" if ":" in host else host
            self._loop.call_soon(ready, f"http://{address}:{port}")
            await http.serve([listener])
        finally:
            # in a thread, as it waits for the model's step,
            # and the loop has connections to close meanwhile
            await asyncio.to_thread(self.scheduler.stop)
            self._pool.shutdown(cancel_futures=True)
            listener.close()
        return 130 if signal.SIGINT in http.caught else 0

    def stop(self) -> None:
        """End gracefully, as after SIGTERM; from any thread."""
        if self._http is not None:
            self._http.should_exit = True

    def _deliver(self, updates: list[Update]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(deliver, updates)

    def _give_up(self) -> None:
        """Tell all who still wait that there will be no answer."""
        for inbox in self._chat.inboxes:
            inbox.updates.append((0, RequestError(503, "the server is stopping")))
            inbox.ready.set()


def _batch_of(model: Any, limits: Limits) -> tuple[Batch, int]:
    """Return what writes a model's answers, and the longest sequence that it reads."""
    if isinstance(model, LlavaModel):
        from llavakit_plugins.serving.torch_batch import TorchBatch

        return TorchBatch(model, limits.chunk, limits.cache_rows), model.language.max_length
    from llavakit_plugins.serving.onnx_batch import OnnxBatch

    batch = OnnxBatch(model, limits.chunk, limits.cache_rows)
    return batch, model.manifest.shapes.max_length


def _log_sample(sample: Any) -> None:
    for turn in sample.turns[-1:]:
        _log.info("asked: %s (%d images)", on_one_line(turn.text)[:2000], len(sample.images))


class _Http(uvicorn.Server):
    """uvicorn's server: signals end it gracefully, and no connection lasts forever."""

    should_exit: bool

    def __init__(self, app: ASGIApp, limits: Limits, give_up: Callable[[], None]) -> None:
        self._limits, self._give_up = limits, give_up
        protocol = type("Protocol", (_Timed,), {"seconds": limits.header_seconds})
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=30,
            # 2 s more than `_give_up` waits: the errors that it sends have to reach their clients
            timeout_graceful_shutdown=round(limits.grace_seconds) + 2,
        )
        super().__init__(config)
        self.caught: list[int] = []
        self._closing: dict[Any, float] = {}

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # uvicorn's own raises the signal again at the end, which would replace our exit code
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.caught.append(sig)
        if self.should_exit:  # the second: at once
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        late = loop.call_later(self._limits.grace_seconds, self._give_up)
        try:
            await super().shutdown(list(sockets or []))
        finally:
            late.cancel()

    async def on_tick(self, counter: int) -> bool:
        # a tick is 0.1 s: once a second is enough
        if counter % 10 == 0:
            self._abort_stuck()
        return await super().on_tick(counter)

    def _abort_stuck(self) -> None:
        """End connections that are closed here, whose client reads not what is left to send."""
        now = time.monotonic()
        closing = {
            protocol.transport
            for protocol in self.server_state.connections
            if protocol.transport is not None and protocol.transport.is_closing()
        }
        self._closing = {each: self._closing.get(each, now) for each in closing}
        for transport, since in self._closing.items():
            if now - since > self._limits.send_seconds:
                transport.abort()


class _Timed(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection that sends a request's head in time, and none that is endless."""

    seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head = 0
        self._late: asyncio.TimerHandle | None = None
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._head = 0
            self._expect(False)
            return
        self._head += len(data)
        if self._head > _HEAD_BYTES:
            self.transport.abort()
        elif self._late is None and not self.transport.is_closing():
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(False)
        super().connection_lost(exc)

    def _expect(self, head: bool = True) -> None:
        """Begin or end to wait for a request's head."""
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(self.seconds, self.transport.abort) if head else None
