"""Counts tokens without a network: with OpenAI's vocabularies, or by an estimate that says so.

tiktoken knows the vocabulary of each model, but downloads its file. The package `bpe-openai`
contains the same files (with the same SHA-256).
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha1
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir

from llavakit import Message

ESTIMATE = "estimated from words: within 10 % of OpenAI's tokenizers, up to a third below LLaMA's"

_PIECE = re.compile(r"[A-Za-z]+|\d{1,3}|[^\sA-Za-z\d]+")
_PER_PIECE = 1.05
# OpenAI's framing: role and separators of each message, and the beginning of the reply
_AROUND_MESSAGE = 4
_OPENS_REPLY = 3


@dataclass(frozen=True)
class Counter:
    """Counts the tokens of a text."""

    vocabulary: str
    """The vocabulary's name, or a sentence on how the count is estimated."""
    exact: bool
    text: Callable[[str], int]

    def messages(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of a request, with those that frame its messages."""
        return _OPENS_REPLY + sum(
            _AROUND_MESSAGE + self.text(message.content) for message in messages
        )


def estimate(text: str) -> int:
    """Return the approximate number of tokens of a text in OpenAI's vocabularies."""
    return round(_PER_PIECE * sum(1 + len(piece) // 12 for piece in _PIECE.findall(text)))


@cache
def counter_for(model: str) -> Counter:
    """Return the counter of a model; an estimate if its vocabulary is not available."""
    try:
        import tiktoken

        name = tiktoken.encoding_name_for_model(model)
    except (ImportError, KeyError):
        name = ""
    if not name or not _available(name):
        return Counter(ESTIMATE, False, lru_cache(maxsize=256)(estimate))
    encoding = tiktoken.get_encoding(name)

    # system messages and examples are the same in every request
    @lru_cache(maxsize=256)
    def count(text: str) -> int:
        return len(encoding.encode_ordinary(text))

    return Counter(name, True, count)


def _available(name: str) -> bool:
    """Put a vocabulary into tiktoken's cache; return whether it is there.

    tiktoken looks into the cache before it downloads, and checks the file's SHA-256 itself.
    """
    # tiktoken names a file in its cache by the SHA-1 of this address
    url = f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or Path(gettempdir()) / "data-gym-cache"
    path = Path(folder) / sha1(url.encode()).hexdigest()
    if path.is_file():
        return True
    package = find_spec("bpe_openai")
    if package is None or package.origin is None:
        return False
    packed = Path(package.origin).parent / "data" / f"{name}.tiktoken.gz"
    if not packed.is_file():
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # written aside and renamed: another process never sees half a file
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(gzip.decompress(packed.read_bytes()))
        partial.replace(path)
    except OSError:  # such as a full disk: the caller then uses the estimate, which says so
        return False
    return True
