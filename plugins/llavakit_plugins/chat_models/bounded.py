"""Puts limits on the official client: no endless answer, and none from another address.

All HTTP responses are read here completely, and any error in one becomes a Fault.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import Any

import openai

from llavakit import ChatError
from llavakit_plugins.chat_models.faults import Fault

_MOST = 32 << 20  # bytes of an answer, unpacked; 100,000 tokens of a reply are below 1 MB
_MOST_OF_A_FILE = 1 << 30  # of the replies of a whole batch
_MOST_REDIRECTS = 5
_PIECE = 1 << 18  # bytes of a request that are sent at once
_OURS = (b"content-encoding", b"content-length", b"transfer-encoding")
_GZIP = 16 + zlib.MAX_WBITS

_base: Any = openai.DefaultAioHttpClient if find_spec("aiohttp") else openai.DefaultAsyncHttpxClient


class BoundedClient(_base):  # type: ignore[misc]
    """Sends requests as the official client does."""

    async def send(self, request: Any, **settings: Any) -> Any:
        """Return the response, read and unpacked. Raises Fault, or ChatError for a redirect."""
        settings |= {"stream": True, "follow_redirects": False}
        request = _in_pieces(request)
        try:
            for _ in range(_MOST_REDIRECTS):
                response = await super().send(request, **settings)
                try:
                    following = response.next_request
                    if following is None:
                        return await _read(response)
                finally:
                    await response.aclose()
                _stay(request.url, following.url)
                request = following
        except (ChatError, Fault):
            raise
        except Exception as error:  # of three libraries, each with its own for what is no HTTP
            raise Fault(_reason(error)) from error
        raise Fault(f"it redirects more than {_MOST_REDIRECTS} times")


def _stay(here: Any, there: Any) -> None:
    """Raise ChatError if a redirect leads to another origin: the request is not meant for it."""
    if (here.scheme, here.host, here.port) != (there.scheme, there.host, there.port):
        raise ChatError(
            f"{here.scheme}://{here.netloc.decode()} sends requests on to "
            f"{there.scheme}://{there.netloc.decode()}, which is not asked; if that is the "
            "service, name it in `base_url`"
        )


class _Pieces:
    """The bytes of a request, as often as they are asked for."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._data), _PIECE):
            yield bytes(self._data[start : start + _PIECE])


def _in_pieces(request: Any) -> Any:
    """Return a request whose body, where it is large, is sent in pieces: images make it so, and
    aiohttp would hold up all other requests while it writes one."""
    try:
        content = request.content
    except Exception:  # of either client: a file's upload comes in pieces already
        return request
    if len(content) <= _PIECE:
        return request
    return type(request)(
        request.method,
        request.url,
        headers=request.headers,
        content=_Pieces(content),
        extensions=request.extensions,
    )


async def _read(response: Any) -> Any:
    """Return the same response with all of its content."""
    most = _MOST_OF_A_FILE if response.request.url.path.endswith("/content") else _MOST
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    chunks = response.aiter_raw()
    if coding in ("gzip", "x-gzip"):
        chunks = _unpacked(chunks, most)
    elif coding != "identity":
        raise Fault(f"the answer is packed as `{coding}`, which was not asked for")
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > most:
            raise Fault(f"the answer is longer than {most >> 20} MiB")
    # the content is unpacked and whole now: its old length and coding would be read again
    kept = [(name, value) for name, value in response.headers.raw if name.lower() not in _OURS]
    return type(response)(
        response.status_code,
        headers=kept,
        content=bytes(data),
        request=response.request,
        extensions=response.extensions,
    )


async def _unpacked(chunks: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """Yield what gzip holds, a little beyond `most` at the most."""
    unpack = zlib.decompressobj(_GZIP)
    async for chunk in chunks:
        if not unpack.eof:
            yield unpack.decompress(chunk, most + 1)
            if unpack.unconsumed_tail:
                raise Fault(f"the answer is longer than {most >> 20} MiB")
    if not unpack.eof:
        raise Fault("the answer ends too early")


def _reason(error: BaseException) -> str:
    """Return what failed, from the innermost error: the adapter for aiohttp calls every failed
    connection a timeout."""
    chain = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(behind)
    system = [
        one for one in chain if isinstance(one, OSError) and not isinstance(one, TimeoutError)
    ]
    if system:
        return f"the connection failed: {system[0]}"
    if "Timeout" in type(chain[-1]).__name__:
        return "the connection failed: no answer in time"
    return f"the answer is not to be read: {str(chain[-1]) or type(chain[-1]).__name__}"
