"""Who may ask: the key, the name that the server is called by, and the pages that call it."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from starlette.types import Scope

from llavakit import LlavaError, hide, shown
from llavakit_plugins.serving.errors import RequestError

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_SHORTEST, _LONGEST = 16, 1024  # of a key
_OPEN = re.compile(r"/(?:[a-z]+\.(?:js|css|ico)|health)?")  # the page, which shows nothing


class Guard:
    """Refuses a request before anything of it is read."""

    def __init__(
        self, *, host: str, keys: Collection[str] = (), origins: Collection[str] = ()
    ) -> None:
        self._keys = [key.encode() for key in keys]
        self._origins = frozenset(map(_read_origin, origins))
        # A page of another site may have its own name point to 127.0.0.1 (DNS rebinding): then
        # the browser takes the server for that site's, but still says its name.
        self._names = _LOOPBACK if is_loopback(host) else None

    def check(self, scope: Scope) -> None:
        """Raise RequestError where the request must not be answered."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        if self._names is not None and _name(f"//{host}") not in self._names:
            raise RequestError(403, "this server answers on this machine alone, by its own name")
        origin = headers.get(b"origin", b"").decode("latin-1")
        # the page that this server gives out has the server itself as its origin
        own = origin.partition("://")[2] == host
        if origin and not own and origin not in self._origins and "*" not in self._origins:
            raise RequestError(
                403, "pages of other sites may not ask; `--allow-origin` names those that may"
            )
        if self._keys and not _OPEN.fullmatch(scope["path"]):
            self._check_key(headers.get(b"authorization", b""))

    def allowed_origin(self, scope: Scope) -> str | None:
        """Return the other site whose page asks and may read the answer."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        origin = headers.get(b"origin", b"").decode("latin-1")
        allowed = origin in self._origins or "*" in self._origins
        return origin if origin and allowed else None

    def _check_key(self, given: bytes) -> None:
        scheme, _, key = given.partition(b" ")
        # all of them are compared, each in constant time: how long it takes tells nothing
        same = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(same):
            raise RequestError(
                401,
                "Incorrect API key provided; send `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _read_origin(address: str) -> str:
    """Return a site as browsers name it in `Origin`. Raises LlavaError for what is no site."""
    if address == "*":
        return address
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not parts.scheme or parts.path.strip("/") or parts.query or parts.fragment:
        raise LlavaError(
            f"--allow-origin {shown(address)}: give a site's address without a path, such as "
            "https://example.org, or * for all"
        )
    host = f"[{host}]" if ":" in host else host
    own = port in (None, {"http": 80, "https": 443}.get(parts.scheme))
    return f"{parts.scheme}://{host}" if own else f"{parts.scheme}://{host}:{port}"


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach what listens there."""
    return host.strip("[]") in _LOOPBACK or host.startswith("127.")


def read_keys(path: Path) -> list[str]:
    """Return the keys in a file, one a line. LlavaError, which shows none, for a file without."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(None, "it is no file")  # a pipe may never end
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise LlavaError(f"cannot read the key file {path}: {reason}") from None
    if os.name == "posix" and mode & 0o077:
        raise LlavaError(
            f"the key file {path} can be read by other users of this machine; run "
            f"`chmod 600 {path}`"
        )
    keys = [line.strip() for line in lines if line.strip()]
    usable = [key.isascii() and key.isprintable() and " " not in key for key in keys]
    long_enough = [_SHORTEST <= len(key) <= _LONGEST for key in keys]
    if not keys or not all(usable) or not all(long_enough):
        raise LlavaError(
            f"the key file {path} needs a key on each line: {_SHORTEST} to {_LONGEST} letters, "
            "digits and signs of ASCII, without spaces; make one with `openssl rand -hex 32`"
        )
    for key in keys:
        hide(key)
    return keys
