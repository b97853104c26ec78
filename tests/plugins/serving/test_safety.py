"""What the server refuses, and how it treats clients that are slow, broken, hostile or gone."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.plugins.serving.conftest import (
    Json,
    Running,
    asks,
    data_url,
    picture,
    receive,
    request,
    serving,
    until,
)

from llavakit import LlavaError, LlavaModel
from llavakit_plugins.serving.chat import Inbox
from llavakit_plugins.serving.guard import Guard, read_keys
from llavakit_plugins.serving.scheduler import Job

CHAT = "/v1/chat/completions"
KEY = "k-0123456789abcdef0123456789abcdef"
LONG: Json = {"messages": asks("what is it ?"), "max_tokens": 9000, "stream": True}


def shown_image(url: object) -> list[Json]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


# -- what is too large


def test_an_oversized_body_is_refused_before_it_is_read(lively: LlavaModel) -> None:
    with serving(lively, body_bytes=10_000) as server:
        with server.connect() as connection:
            head = request(CHAT, b"", Content_Length=str(10**12))
            connection.sendall(head)  # no byte of the body
            status, _, data = receive(connection)
        assert status == 413
        assert json.loads(data)["error"]["code"] == "request_too_large"
        with server.connect() as connection:  # one that does not say how long it is
            chunked = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            connection.sendall(f"{chunked}Content-Type: application/json\r\n\r\n".encode())
            for _ in range(11):
                connection.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
            assert receive(connection)[0] == 413
        until(lambda: held(server) == 0)
        assert server.chat(messages=asks("what is it ?"), max_tokens=2)[0] == 200


def held(server: Running) -> float:
    return server.server.metrics.levels["bodies_bytes"]()


def test_all_bodies_together_have_a_limit(lively: LlavaModel) -> None:
    with serving(lively, body_bytes=10_000, bodies_bytes=15_000) as server:
        slow = server.connect()
        slow.sendall(request(CHAT, b" " * 9000, Content_Length="9999"))
        until(lambda: held(server) == 9000)
        status, headers, _ = server.send(CHAT, b" " * 9000)
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        slow.close()
        until(lambda: held(server) == 0)


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few kilobytes that claims so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (9_000, 9_000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_a_bomb_is_refused_by_its_header(running: Running, size: tuple[int, int]) -> None:
    memory = psutil.Process().memory_info().rss
    status, body = running.chat(messages=shown_image(data_url(bomb(*size))))
    assert status == 400
    assert "image" in body["error"]["message"]
    assert psutil.Process().memory_info().rss - memory < 100e6


@pytest.mark.parametrize(
    ("limits", "asked", "message"),
    [
        ({"images": 1}, {"messages": asks("?", picture(1), picture(2))}, "at most 1 images"),
        ({"image_pixels": 1000}, {"messages": asks("?", picture(1))}, "more than 1000 pixels"),
        ({"choices": 2}, {"messages": asks("?"), "n": 3}, "at most 2"),
    ],
)
def test_limits_of_a_request(lively: LlavaModel, limits: Json, asked: Json, message: str) -> None:
    with serving(lively, **limits) as server:
        status, body = server.chat(**asked)
    assert status == 400
    assert message in body["error"]["message"]


def test_tokens_have_a_limit(endless: LlavaModel) -> None:
    with serving(endless, tokens=7, default_tokens=5) as server:
        for asked, most in (({"max_tokens": 100}, 7), ({}, 5)):
            _, body = server.chat(messages=asks("what is it ?"), **asked)
            assert body["usage"]["completion_tokens"] == most
            assert body["choices"][0]["finish_reason"] == "length"


# -- what is none of the client's business


@pytest.mark.parametrize(
    "url",
    ["/etc/hostname", "file:///etc/hostname", "http://127.0.0.1:1/x.png", "https://example.org/x",
     "ftp://a/b", "data:text/plain,hello", "data:image/png;base64,!!!", "data:image/png;base64,",
     "", 7, None, ["x"], {"url": {}}],
)  # fmt: skip
def test_nothing_is_read_but_what_the_request_holds(running: Running, url: object) -> None:
    status, body = running.chat(messages=shown_image(url))
    assert status == 400
    assert "error" in body
    for key in ("path", "url", "image", "base64"):
        content = [{"type": "image", key: url}]
        assert running.chat(messages=[{"role": "user", "content": content}])[0] == 400


def test_other_kinds_of_images_are_not_opened(running: Running) -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    status, body = running.chat(messages=shown_image(data_url(script, "image/png")))
    assert status == 400
    assert "PNG, JPEG" in body["error"]["message"]


def test_keys(lively: LlavaModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(lively, keys=(KEY, f"{KEY}-2")) as server:
        for given in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY):
            headers = {"Authorization": given} if given else {}
            for path, body in ((CHAT, LONG), ("/v1/models", None), ("/metrics", None)):
                status, told, data = server.send(path, body, **headers)
                assert status == 401, given
                assert told["www-authenticate"] == "Bearer"
                assert json.loads(data)["error"]["code"] == "invalid_api_key"
        for key in (KEY, f"{KEY}-2"):
            assert server.send("/v1/models", Authorization=f"bearer {key}")[0] == 200
        assert [model.id for model in server.client(api_key=KEY).models.list()] == ["small"]
        assert server.send("/health")[0] == 200
        assert server.send("/")[0] == 200  # the page shows nothing of the model
    assert KEY not in caplog.text


def test_a_path_is_one_line_of_the_log(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert running.send("/x%0aPOST%20/v1%20200%0d%1b")[0] == 404
    assert r"GET /x\nPOST /v1 200\r\x1b 404" in caplog.text


def test_a_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n{KEY}-2\n")
    file.chmod(0o644)
    with pytest.raises(LlavaError, match="chmod 600"):
        read_keys(file)
    file.chmod(0o600)
    assert read_keys(file) == [KEY, f"{KEY}-2"]
    for text in ("", "short", f"{KEY} and more", "ä" * 40, "x" * 5000, "\0" * 40):
        file.write_text(text)
        with pytest.raises(LlavaError) as refused:
            read_keys(file)
        assert text.strip() == "" or text not in str(refused.value)
    for wrong in (tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(LlavaError, match="key file"):
            read_keys(wrong)


def test_only_this_machine_by_its_own_name(running: Running) -> None:
    for host in ("localhost", "127.0.0.1:1", "[::1]:80"):
        assert running.send("/health", Host=host)[0] == 200
    for host in ("evil.example", "localhost.evil.example", "", "[::", "10.0.0.1"):
        assert running.send("/health", Host=host)[0] in (400, 403), host  # DNS rebinding
    assert running.send(CHAT, LONG, Origin="https://evil.example")[0] == 403
    assert running.send(CHAT, LONG, Origin="null")[0] == 403
    assert running.send("/v1/models", Origin="http://localhost")[0] == 200
    # a form of another site can send no JSON
    assert running.send(CHAT, LONG, Content_Type="text/plain")[0] == 415
    Guard(host="0.0.0.0").check({"headers": [(b"host", b"my.machine")], "path": "/"})


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_book_is_refused_before_it_is_tokenised(
    running: Running, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.model, "prompt", None)  # to call it would be status 500
    book = {"role": role, "content": "a b " * 1_000_000}
    status, answer = running.chat(messages=[book, *asks("what ?")][: 2 if role == "system" else 1])
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"


def test_pages_of_an_allowed_site_may_ask(lively: LlavaModel) -> None:
    with serving(lively, origins=("https://Mine.example:443/",)) as server:
        status, headers, _ = server.send("/v1/models", Origin="https://mine.example")
        assert status == 200
        assert headers["access-control-allow-origin"] == "https://mine.example"
        asked = {"Origin": "https://mine.example", "Access-Control-Request-Method": "POST"}
        status, headers, _ = server.send(CHAT, method="OPTIONS", **asked)
        assert status == 204
        assert "authorization" in headers["access-control-allow-headers"]
        assert server.send("/v1/models", Origin="https://other.example")[0] == 403


def test_no_text_of_a_request_is_logged(
    lively: LlavaModel, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(lively) as server:
        server.chat(messages=asks("SECRETWORD ?"), max_tokens=2)
        server.chat(messages=[{"role": "SECRETWORD"}])
        server.send("/v1/models?key=SECRETWORD")
        server.send("/SECRETWORD\x1b[2J".replace("\x1b", "%1b"))
        server.client(timeout=5).models.list()
    out, err = capfd.readouterr()
    written = caplog.text + out + err
    assert "POST /v1/chat/completions 200" in written
    assert "SECRETWORD ?" not in written
    assert "key=" not in written
    assert "\x1b" not in written


# -- ten thousand bodies that are no requests


VALID: Json = {
    "model": "small", "messages": asks("what is it ?", picture(1, (9, 8))), "max_tokens": 1,
    "temperature": 0.5, "top_p": 0.9, "n": 1, "seed": 4, "stop": ["it"],
    "logprobs": True, "top_logprobs": 2, "stream_options": None, "user": "someone",
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2**63, -(2**70), 10**400, 1.5, 1e308, -1e-320, float("nan"),
    float("inf"), "", "x", "\ud800", "\0", "<image>", "é" * 500, [], {}, [[]], [{}], {"": None},
    [None], {"role": "user"}, {"type": "text"}, {"type": "image_url"}, ["<image>"], "data:,",
]  # fmt: skip


def mutated(draw: random.Random) -> bytes:
    """Return the body of a valid request with something wrong in it."""
    body = json.loads(json.dumps(VALID))
    kind = draw.randrange(8)
    if kind < 5:  # odd values, anywhere
        for _ in range(draw.randrange(1, 4)):
            at: Any = body
            while True:
                keys = list(at) if isinstance(at, dict) else list(range(len(at)))
                if not keys:
                    break
                key = draw.choice(keys)
                if isinstance(at[key], dict | list) and at[key] and draw.random() < 0.7:
                    at = at[key]
                    continue
                if draw.random() < 0.2:
                    del at[key]
                else:
                    at[key] = draw.choice(ODD)
                break
        if draw.random() < 0.2:
            body[draw.choice(["tools", "logit_bias", "top_k", "min_p", "x" * 99])] = draw.choice(
                ODD
            )
        return json.dumps(body).encode()
    text = bytearray(json.dumps(body).encode())
    if kind == 5:  # cut, or bytes flipped
        if draw.random() < 0.5:
            return bytes(text[: draw.randrange(len(text))])
        for _ in range(draw.randrange(1, 9)):
            text[draw.randrange(len(text))] = draw.randrange(256)
        return bytes(text)
    if kind == 6:  # so deep that a naive parser runs out of stack
        deep = draw.choice([b"[", b'{"a":', b'[{"messages":'])
        return deep * draw.choice([10, 500, 20_000])
    return draw.randbytes(draw.randrange(60))


def test_ten_thousand_malformed_bodies(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(7)
    statuses: dict[int, int] = {}
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: {}\r\n\r\n"
    )
    with running.connect(60) as connection:
        answers = connection.makefile("rb")
        for _ in range(200):  # one connection, and fifty requests at a time
            bodies = [mutated(draw) for _ in range(50)]
            connection.sendall(b"".join(head.format(len(b)).encode() + b for b in bodies))
            for body in bodies:
                status = int(answers.readline().split()[1])
                length = 0
                while (line := answers.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                table = json.loads(answers.read(length))
                assert status in (200, 400, 404), (body, table)
                assert ("error" in table) == (status != 200)
                statuses[status] = statuses.get(status, 0) + 1
    assert sum(statuses.values()) == 10_000
    assert statuses[400] > 7000
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert running.chat(messages=asks("what is it ?"), max_tokens=2)[0] == 200
    until(lambda: running.server.scheduler.busy == 0)


def test_what_is_no_http(running: Running) -> None:
    tls, negative = b"\x16\x03\x01\x02\x00" * 20, b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"
    wrong = (tls, negative, b"GET\r\n\r\n", b"\r\n" * 9, b"GET / HTTP/9.9\r\n\r\n", os.urandom(300))
    for data in wrong:
        with running.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1000)
            assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), data
    assert running.send("/health")[0] == 200


# -- clients that are slow, or gone


def test_a_slow_head_and_a_slow_body(lively: LlavaModel) -> None:
    with serving(lively, header_seconds=0.3, body_seconds=0.3) as server:
        with server.connect() as connection:  # never says what it wants
            connection.sendall(b"GET /health HT")
            assert ended(connection)
        with server.connect() as connection:  # a head without end
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            with pytest.raises(ConnectionError):
                connection.sendall((b"X: " + b"y" * 4000 + b"\r\n") * 20_000)
        with server.connect() as connection:
            connection.sendall(request(CHAT, b'{"mess', Content_Length="500"))
            assert receive(connection)[0] == 408
        # a second request on a kept connection has no more time than the first
        with server.connect() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in connection.recv(1000)
            connection.sendall(b"GET /hea")
            assert ended(connection)
        assert server.send("/health")[0] == 200


def ended(connection: socket.socket) -> bool:
    """Say whether the other side ends the connection; its last bytes are left."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_client_that_does_not_read_is_dropped(endless: LlavaModel) -> None:
    body = {**LONG, "logprobs": True, "top_logprobs": 20}
    with serving(endless, send_seconds=0.3) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request(CHAT, body))
        until(lambda: server.server.scheduler.busy == 1)
        assert server.chat(messages=asks("what is it ?"), max_tokens=3)[0] == 200  # meanwhile
        until(lambda: server.server.scheduler.busy == 0, 30)
        until(lambda: server.server.metrics.levels["connections"]() == 0)
        connection.close()


def test_an_answer_has_a_time_limit(endless: LlavaModel) -> None:
    with serving(endless, seconds=0.3) as server:
        status, body = server.chat(messages=asks("what is it ?"), max_tokens=9000)
        assert status == 504
        assert body["error"]["type"] == "server_error"
        _, _, data = server.send(CHAT, LONG)
        last = data.decode().strip().split("\n\n")[-1]
        assert "longer than 0.3 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
        until(lambda: server.server.scheduler.busy == 0)


def leave(server: Running, number: int) -> None:
    """Begin a request and break the connection at one of its stages, without a word."""
    connection = server.connect()
    whole = request(CHAT, {**LONG, "messages": asks("what is it ?", picture(number % 5))})
    connection.sendall(whole if number % 3 else whole[: len(whole) - 50])
    if number % 3 == 1:
        connection.recv(200)  # the answer has begun
    if number % 2:  # a reset, and not an orderly end
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_two_hundred_abrupt_disconnects_leave_nothing(endless: LlavaModel) -> None:
    process = psutil.Process()
    with serving(endless, queue=300) as server:

        def quiet() -> bool:
            levels = server.server.metrics.levels
            return not (server.server.scheduler.busy or levels["connections"]() or held(server))

        for number in range(40):  # what a first use keeps is no leak
            leave(server, number)
        until(quiet, 60)
        gc.collect()
        descriptors, memory = process.num_fds(), process.memory_info().rss
        for number in range(200):
            leave(server, number)
        until(quiet, 60)
        gc.collect()
        assert process.num_fds() <= descriptors
        assert process.memory_info().rss - memory < 30e6
        assert len(server.server.scheduler._writing) == 0
        assert not [each for each in gc.get_objects() if type(each) in (Job, Inbox)]
        status, _ = server.chat(messages=asks("what is it ?"), max_tokens=2)
        assert status == 200
        assert b"llavakit_abandoned_total 0" not in server.send("/metrics")[2]
