"""`llava-run serve` as a program: its flags, its end by a signal, what it says when it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tests.core.processes import start
from tests.plugins.serving.conftest import asks, make_endless, receive, request, until

from llavakit import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "picture-model"
    save_model(make_endless(), folder)
    return folder


@contextmanager
def program(place: Path, folder: Path, *flags: object) -> Iterator[tuple[BaseProcess, int]]:
    """Yield `llava-run serve` in a process of its own, and its port."""
    process = start(place, "serve", folder, "--port", 0, "--device", "cpu", *flags)
    terminal = place / "terminal.txt"

    def port() -> int | None:
        found = re.search(r"serving \S+ on http://\S+:(\d+)\n", terminal.read_text())
        return int(found[1]) if found else None

    try:
        until(lambda: process.exitcode is not None or (terminal.exists() and bool(port())), 60)
        number = port()
        assert number is not None, terminal.read_text()
        yield process, number
    finally:
        process.kill()
        process.join()


def interrupted(process: BaseProcess, port: int, body: object, number: signal.Signals) -> bytes:
    """Send a signal while an answer is written; return the rest of the answer."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(request("/v1/chat/completions", body))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert process.pid is not None
        os.kill(process.pid, number)
        rest = b""
        while part := connection.recv(1 << 16):
            rest += part
    return rest


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_it_after_the_answers_that_are_written(
    folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    body = {"messages": asks("what is it ?"), "max_tokens": 1500, "stream": True}
    with program(tmp_path, folder) as (process, port):
        rest = interrupted(process, port, body, number)
        assert b"data: [DONE]" in rest
        process.join(20)
        assert process.exitcode == code
        with pytest.raises(OSError):  # noqa: PT011
            socket.create_connection(("127.0.0.1", port), 1)
    assert "Traceback" not in (tmp_path / "terminal.txt").read_text()


def test_answers_that_take_too_long_are_given_up_when_it_ends(folder: Path, tmp_path: Path) -> None:
    body = {"messages": asks("what is it ?"), "max_tokens": 8000, "stream": True}
    with program(tmp_path, folder, "--grace", 0) as (process, port):
        rest = interrupted(process, port, body, signal.SIGTERM)
        last = json.loads(rest.rpartition(b"data: ")[2].partition(b"\n\n")[0])
        assert last["error"]["message"] == "the server is stopping"
        process.join(20)
        assert process.exitcode == 0


def test_name_key_and_limits(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef\n")
    key.chmod(0o600)
    flags = ("--name", "mine", "--api-key-file", key, "--max-tokens", 3, "--log-requests")
    with program(tmp_path, folder, *flags) as (_, port):

        def send(**headers: str) -> tuple[int, dict[str, Any]]:
            body = {"model": "mine", "messages": asks("what is WORD ?"), "max_tokens": 50}
            with socket.create_connection(("127.0.0.1", port), 30) as connection:
                connection.sendall(request("/v1/chat/completions", body, **headers))
                status, _, data = receive(connection)
            return status, json.loads(data)

        assert send()[0] == 401
        status, answer = send(Authorization=f"Bearer {key.read_text().strip()}")
        assert status == 200
        assert answer["model"] == "mine"
        assert answer["usage"]["completion_tokens"] <= 3
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as health:
            assert health.status == 200
    written = (tmp_path / "terminal.txt").read_text()
    assert "what is WORD ?" in written
    assert key.read_text().strip() not in written


def test_what_cannot_be_served(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("serve", tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in refused("serve", folder, "--port", port)
    assert "--port" in refused("serve", folder, "--port", 99999)
    assert "--places 0: give more than 0" in refused("serve", folder, "--places", 0)
    assert "--grace nan: give 0 or more" in refused("serve", folder, "--grace", "nan")
    assert "--threads 0: give 1 or more" in refused("serve", folder, "--threads", 0)
    for site in ("nonsense", "https://a.example/page", "http://[", "example.org:80"):
        assert f"--allow-origin {site}: give" in refused("serve", folder, "--allow-origin", site)
    for host in ("http://a.example/", "a.example:80", "a.example,b.example", ""):
        assert f"host '{host}': give" in refused("serve", folder, "--allow-image-host", host)
    assert "key file" in refused("serve", folder, "--api-key-file", tmp_path / "none")


def test_it_says_who_can_reach_it(folder: Path, tmp_path: Path) -> None:
    with program(tmp_path, folder, "--host", "0.0.0.0") as (process, _):
        assert "give --api-key-file" in (tmp_path / "terminal.txt").read_text()
        assert process.exitcode is None
