"""Fetches images by http and https, for a caller that says from which hosts.

An address from a stranger must not make this machine read what only this machine can reach. So a
host must be allowed by name, every address that its name has must be public, and the connection
goes to the very address that was checked: a name that resolves otherwise a moment later changes
nothing. Redirects are followed by the same rules. Proxies of the environment are not used, because
a proxy would resolve the name again.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from threading import Timer
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from llavakit import DataError, LlavaError, shown

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16
_HOST = re.compile(r"[\w.-]+|[0-9a-fA-F:.]+")  # a name in any script, or a number
_BEHIND = 0.01  # seconds
_TRANSLATED = [ipaddress.ip_network(name) for name in ("64:ff9b::/96", "64:ff9b:1::/48")]


@dataclass(frozen=True)
class ImageFetcher:
    """Returns the bytes of an image by its address: `ImageFetcher(["example.org"])(address)`.

    Raises DataError for an address that is not allowed, does not answer in time, or is too large.
    """

    hosts: Sequence[str] = ()
    """Host names that may be read from, each as it stands in the address. None by default."""
    most_bytes: int = 20_000_000
    seconds: float = 10.0
    """For everything: name, connection, redirects and content."""
    redirects: int = 3

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                raise LlavaError(
                    f"host {shown(host)!r}: give a name alone, such as `example.org`, without "
                    "scheme, port and path; each host is named by itself"
                )

    def __call__(self, address: str) -> bytes:
        deadline = time.monotonic() + self.seconds
        for _ in range(self.redirects + 1):
            parts = self._checked(address)
            try:
                found = self._read(parts, deadline)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise DataError(f"{_shown(address)} cannot be fetched ({reason:.200})") from error
            if isinstance(found, bytes):
                return found
            address = urljoin(address, found)
        raise DataError(
            f"{_shown(address)}: the image lies behind more than {self.redirects} redirects; give "
            "the address that they lead to"
        )

    def source(self, given: Any) -> Any:
        """Return what a message names as an image, fetched where it is an address of the web.

        As `read_messages` takes it.
        """
        is_address = isinstance(given, str) and given[:8].lower().startswith(
            ("http://", "https://")
        )
        return self(given) if is_address else given

    def _checked(self, address: str) -> SplitResult:
        """Return the parts of an address that may be read. Raises DataError for another."""
        try:
            parts = urlsplit(address)
            port, host = parts.port, (parts.hostname or "").rstrip(".")
        except ValueError as error:
            raise DataError(f"{_shown(address)} is no address ({error}); fix it") from None
        if parts.scheme not in _PORTS or not host:
            raise DataError(f"{_shown(address)} is no address of the web; images come from there")
        if host not in {allowed.lower().rstrip(".") for allowed in self.hosts}:
            raise DataError(
                f"{_shown(address)}: images of the host `{host:.100}` are not allowed here; allow "
                "it, or give the image itself"
            )
        if parts.username is not None or port not in (None, _PORTS[parts.scheme]):
            raise DataError(
                f"{_shown(address)}: an address with a password or a port is not read; give one "
                "without"
            )
        return parts

    def _read(self, parts: SplitResult, deadline: float) -> bytes | str:
        """Return the content, or the address that it has moved to."""
        host, port = str(parts.hostname), _PORTS[parts.scheme]
        connection = http.client.HTTPConnection(host, port)
        with closing(connection), ExitStack() as stack:
            plain = self._connect(self._resolve(host, port), port, _left(deadline))
            stack.enter_context(_shut_at(deadline, plain))
            secure = parts.scheme == "https"
            connection.sock = self._secured(plain, host) if secure else plain
            path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
            # identity: a compressed answer could grow far beyond the limit when it is unpacked
            headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "llavakit"}
            connection.request("GET", path, headers=headers)
            sock = connection.sock  # the connection may give it up to the response
            answer = connection.getresponse()
            _left(deadline)  # cut headers look as if they had ended
            if answer.status in _REDIRECTS and (moved := answer.getheader("Location")):
                return moved
            if answer.status != http.client.OK:
                raise ValueError(f"the server answered {answer.status}")
            return b"".join(self._chunks(answer, sock, deadline))

    def _chunks(
        self, answer: http.client.HTTPResponse, sock: Any, deadline: float
    ) -> Iterator[bytes]:
        read, too_large = 0, f"it has more than {self.most_bytes:,} bytes"
        # what is stated, first; what comes is counted too,
        # as a server may state nothing or too little
        if (answer.length or 0) > self.most_bytes:
            raise ValueError(too_large)
        while True:
            sock.settimeout(_left(deadline))
            chunk = answer.read1(_CHUNK)
            if not chunk:
                _left(deadline)  # a cut content, too
                break
            read += len(chunk)
            if read > self.most_bytes:
                raise ValueError(too_large)
            yield chunk
        # what is left of the stated length:
        # half an image would decode to one with a grey lower part
        if answer.length:
            raise ValueError("the connection ended before the image did")

    def _resolve(self, host: str, port: int) -> str:
        """Return an address of the host. Raises DataError unless all it has are public."""
        found = [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not found or not all(map(is_public, found)):
            raise DataError(
                f"the host `{host:.100}` is not on the public internet; nothing is read"
            )
        return found[0]

    def _connect(self, ip: str, port: int, seconds: float) -> socket.socket:
        return socket.create_connection((ip, port), timeout=seconds)

    def _secured(self, plain: socket.socket, host: str) -> ssl.SSLSocket:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def is_public(ip: str) -> bool:
    """Say whether an IP address, of either version, is one of the public internet."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or address.teredo
        # addresses that stand for others lead wherever those do
        if inner or any(address in network for network in _TRANSLATED):
            return False
    # `is_global` alone is true for multicast addresses
    return address.is_global and not address.is_multicast


@contextmanager
def _shut_at(deadline: float, plain: socket.socket) -> Iterator[None]:
    """Shut the connection down at the deadline, if the block has not ended.

    A socket's own timeout begins again with each byte: a server could send headers without end.
    """
    # a second handle: TLS takes the first one over
    watched = plain.dup()
    # a little behind it, so that who finds the connection cut finds the time over, too
    timer = Timer(max(0.0, deadline - time.monotonic()) + _BEHIND, _shut, (watched,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        watched.close()


def _shut(watched: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        watched.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    return left


def _shown(address: str) -> str:
    """Return an address for a message: without what may be secret, and cut."""
    bare = address.partition("?")[0].partition("#")[0]
    scheme, found, rest = bare.partition("://")
    if found and "@" in rest.partition("/")[0]:
        rest = rest.partition("@")[2]
    return f"image {scheme}{found}{rest}"[:200].encode("unicode_escape").decode()
