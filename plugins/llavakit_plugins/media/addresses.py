"""Addresses of media that need no network: `file:` and `data:`."""

from __future__ import annotations

from base64 import b64decode
from urllib.parse import unquote, unquote_to_bytes, urlsplit


def local_path(name: str) -> str:
    """Return the path that a `file:` address names; any other name as it is."""
    return unquote(urlsplit(name).path) if name[:5].lower() == "file:" else name


def is_embedded(name: str) -> bool:
    """Say whether a name is a `data:` address, which holds a file itself."""
    return name[:5].lower() == "data:"


def embedded(address: str) -> bytes:
    """Return what a `data:` address holds; base64 may be wrapped in lines, as `base64` does.

    Raises ValueError for base64 with anything else in it.
    """
    kind, _, written = address.partition(",")
    data = unquote_to_bytes(written)
    if not kind.lower().endswith(";base64"):
        return data
    # without `validate`, Python drops characters that are not base64 and decodes the rest
    return b64decode(b"".join(data.split()), validate=True)
