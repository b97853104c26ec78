"""Images from the web: only from allowed hosts, of public addresses, within limits."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from llavakit import DataError, read_messages
from llavakit_plugins.fetching.images import ImageFetcher, is_public

PNG = io.BytesIO()
Image.new("RGB", (4, 3), "red").save(PNG, "PNG")
CONTENT = PNG.getvalue()

Action = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Site:
    port: int
    actions: dict[str, Action] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture
def site() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append((self.headers["Host"], self.path))
            made.actions.get(self.path, send)(self)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Site(server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


def send(handler: BaseHTTPRequestHandler, length: int | None = len(CONTENT)) -> None:
    handler.send_response(200)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(CONTENT)


def redirect(to: str) -> Action:
    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.end_headers()

    return act


@dataclass(frozen=True)
class Here(ImageFetcher):
    """Public names lead to the site of the test; what was checked is kept."""

    site: Any = None
    names: Any = None  # addresses by host
    dialled: list[str] = field(default_factory=list)

    def _resolve(self, host: str, port: int) -> str:
        original = socket.getaddrinfo
        found = (self.names or {}).get(host, ["93.184.215.14"])
        socket.getaddrinfo = lambda *_, **__: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found
        ]
        try:
            return super()._resolve(host, port)
        finally:
            socket.getaddrinfo = original

    def _connect(self, ip: str, port: int, seconds: float) -> socket.socket:
        self.dialled.append(f"{ip}:{port}")
        return socket.create_connection(("127.0.0.1", self.site.port), timeout=seconds)


def test_an_image_of_an_allowed_host_is_fetched(site: Site) -> None:
    fetch = Here(["Example.org"], site=site)
    assert fetch("http://EXAMPLE.org/a.png?b=c#d") == CONTENT
    assert site.asked == [("example.org", "/a.png?b=c")]
    assert fetch.dialled == ["93.184.215.14:80"]  # the address that was checked
    part = {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}
    sample = read_messages([{"role": "user", "content": [part]}], source=fetch.source)
    assert sample.images == (CONTENT,)
    assert fetch.source("a.png") == "a.png"


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://other.org/a.png", "host `other.org` are not allowed"),
        ("http://example.org.evil.net/a.png", "are not allowed"),
        ("http://user:pass@example.org/a.png", "with a password or a port"),
        ("http://example.org:8080/a.png", "with a password or a port"),
        ("http://example.org@other.org/", "host `other.org` are not allowed"),
        ("ftp://example.org/a.png", "no address of the web"),
        ("file:///etc/passwd", "no address of the web"),
        ("http:///a.png", "no address of the web"),
        ("http://[::1/a.png", "is no address"),
        ("http://example.org:99999/", "is no address"),
        ("http://127.0.0.1/", "are not allowed"),
    ],
)
def test_what_is_not_allowed_is_never_dialled(site: Site, address: str, sentence: str) -> None:
    fetch = Here(["example.org"], site=site)
    with pytest.raises(DataError, match=sentence) as raised:
        fetch(address)
    assert "pass" not in str(raised.value).replace("password", "").replace("passwd", "")
    assert not fetch.dialled
    with pytest.raises(DataError, match="are not allowed"):
        ImageFetcher()("http://example.org/a.png")


@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.3.4", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1",
        "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8",
        "2002:7f00:1::1", "64:ff9b::7f00:1", "2001:db8::1",
    ],
)  # fmt: skip
def test_private_addresses_are_never_dialled(site: Site, ip: str) -> None:
    assert not is_public(ip)
    fetch = Here(["example.org"], site=site, names={"example.org": ["93.184.215.14", ip]})
    with pytest.raises(DataError, match="not on the public internet"):
        fetch("https://example.org/a.png")
    assert not fetch.dialled


@pytest.mark.parametrize(
    "ip", ["93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
)
def test_public_addresses_are_told(ip: str) -> None:
    assert is_public(ip)


def test_redirects_are_followed_by_the_same_rules(site: Site) -> None:
    site.actions["/1"] = redirect("/2")
    site.actions["/2"] = redirect("http://example.net/3")
    site.actions["/out"] = redirect("http://other.org/")
    site.actions["/in"] = redirect("http://inner.org/")
    site.actions["/round"] = redirect("/round")
    names = {"inner.org": ["10.0.0.1"]}
    fetch = Here(["example.org", "example.net", "inner.org"], site=site, names=names)
    assert fetch("http://example.org/1") == CONTENT
    assert [path for _, path in site.asked] == ["/1", "/2", "/3"]
    for path, sentence in (("out", "not allowed"), ("in", "public internet"), ("round", "than 3")):
        with pytest.raises(DataError, match=sentence):
            fetch(f"http://example.org/{path}")
    assert len(site.asked) == 3 + 1 + 1 + 4


def test_size_is_limited_whatever_the_server_says(site: Site) -> None:
    site.actions["/says"] = lambda handler: send(handler, 10**9)
    site.actions["/silent"] = lambda handler: send(handler, None)
    fetch = Here(["example.org"], site=site, most_bytes=len(CONTENT) - 1)
    for path in ("says", "silent", "a.png"):
        with pytest.raises(DataError, match="it has more than"):
            fetch(f"http://example.org/{path}")
    exact = Here(["example.org"], site=site, most_bytes=len(CONTENT))
    assert exact("http://example.org/silent") == CONTENT


def test_a_server_that_is_slow_is_left(site: Site) -> None:
    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            try:
                handler.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.05)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(2000):  # each byte comes in time, and the header never ends
            try:
                handler.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.05)

    site.actions["/trickle"] = trickle
    site.actions["/drip"] = drip
    site.actions["/hang"] = lambda handler: time.sleep(2)
    fetch = Here(["example.org"], site=site, seconds=0.4)
    for path in ("trickle", "drip", "hang"):
        begun = time.monotonic()
        with pytest.raises(DataError, match="cannot be fetched"):
            fetch(f"http://example.org/{path}")
        assert time.monotonic() - begun < 30  # and not the 5 s that it would go on, or for ever


def noise(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\xff noise\r\n\r\n")


def test_other_answers_are_sentences(site: Site) -> None:
    site.actions["/404"] = lambda handler: handler.send_error(404)
    site.actions["/short"] = lambda handler: send(handler, len(CONTENT) + 5)
    site.actions["/noise"] = noise
    fetch = Here(["example.org"], site=site)
    for path, sentence in (("404", "answered 404"), ("short", "cannot be"), ("noise", "BadStatus")):
        with pytest.raises(DataError, match=sentence):
            fetch(f"http://example.org/{path}")
    with pytest.raises(DataError, match="cannot be fetched") as raised:
        fetch("https://example.org/secret.png?token=abc")  # no TLS there
    assert "abc" not in str(raised.value)
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch("http://example.org/a b\r\nX: y")
