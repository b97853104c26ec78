"""A server in a thread of the test, around a small model."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugins.onnx_models import HEADS_OF_16, make_model

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from llavakit import LlavaModel
from llavakit_plugins.serving.guard import Guard
from llavakit_plugins.serving.limits import Limits
from llavakit_plugins.serving.server import Server, Serving, listen

LIVELY = {**HEADS_OF_16, "initializer_range": 0.6, "max_position_embeddings": 320}
"""Weights so large that no two tokens are nearly as likely: rounding changes no answer."""
Json = dict[str, Any]


@dataclass
class Running:
    """A server that runs."""

    url: str
    port: int
    server: Server
    model: Any
    clients: ExitStack = field(default_factory=ExitStack)

    def client(self, **options: Any) -> Any:
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options}
        )
        return self.clients.enter_context(client)

    def connect(self, timeout: float = 20) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def send(
        self, path: str, body: object = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request by hand; return status, headers and body of the answer."""
        with self.connect() as connection:
            connection.sendall(request(path, body, method, **headers))
            return receive(connection)

    def chat(self, **body: Any) -> tuple[int, Json]:
        """Send a chat request; return the status and the body."""
        status, _, data = self.send("/v1/chat/completions", body)
        return status, json.loads(data)


def request(path: str, body: object = None, method: str | None = None, **headers: str) -> bytes:
    """Return the bytes of a request of HTTP/1.1 that ends its connection."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    own = {"Host": "localhost", "Connection": "close"}
    if body is not None:
        own |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
    own |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in own.items())]
    return "\r\n".join([*lines, "", ""]).encode() + data


def receive(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read an answer up to the end of its connection."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        whole = b""
        while body:
            size, _, rest = body.partition(b"\r\n")
            whole, body = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        body = whole
    return int(first.split()[1]), headers, body


@contextmanager
def serving(
    model: Any, *, keys: tuple[str, ...] = (), origins: tuple[str, ...] = (), **limits: Any
) -> Iterator[Running]:
    """Yield a server on a free port; it ends with the block."""
    guard = Guard(host="127.0.0.1", keys=keys, origins=origins)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(Serving(model, "small", guard, Limits(**{"grace_seconds": 0.5, **limits})))
    ready = threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(server.run(listener, lambda address: ready.set()))
    )
    thread.start()
    try:
        assert ready.wait(20)
        running = Running(f"http://127.0.0.1:{port}", port, server, model)
        with running.clients:
            yield running
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
        assert server.scheduler.error is None


@pytest.fixture(scope="session")
def lively() -> LlavaModel:
    return make_model(LIVELY)


def make_endless() -> LlavaModel:
    """Return a model whose answers end where they are cut, and no sooner."""
    model = make_model({**LIVELY, "max_position_embeddings": 16384})
    with torch.no_grad():
        for end in model.end_ids:
            model.language.head.weight[end] = 0.0  # some other token is always likelier
    return model


@pytest.fixture(scope="session")
def endless() -> LlavaModel:
    return make_endless()


@pytest.fixture(scope="session")
def running(lively: LlavaModel) -> Iterator[Running]:
    with serving(lively) as server:
        yield server


def picture(seed: int = 0, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """Return an image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asks(text: str, *images: bytes) -> list[Json]:
    """Return the messages of one question with images, as OpenAI has them."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(data)}} for data in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is true; fail where that takes too long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.plugins.serving.pages import launched

    with launched() as browser:
        yield browser


@pytest.fixture
def held(browser: Any, running: Running) -> Iterator[Any]:
    """A page whose answers the test writes."""
    from tests.plugins.serving.pages import HELD, opened

    yield from opened(browser, running, script=HELD)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.plugins.serving.pages import flower

    return flower(tmp_path_factory.mktemp("photo"))
