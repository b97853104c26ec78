"""What a ledger holds: requests, replies, and the keys by which they find each other."""

from __future__ import annotations

import json
import re
import reprlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from hashlib import sha256
from typing import Any

from llavakit import DataError, Message, Reply
from llavakit_plugins.generation.requests.pictures import hash_image


@dataclass(frozen=True)
class Request:
    """One request to a chat model."""

    messages: tuple[Message, ...]
    draw: int = 0
    """Number of the reply to these messages, from 0; another draw asks for another reply."""
    label: str = ""
    """What the request is for, for a person who reads the ledger."""


@dataclass(frozen=True)
class Entry:
    """A reply, and the request that it belongs to."""

    key: str
    identity: str
    """Hash of the chat model's identity."""
    prompt: str
    """Hash of the messages."""
    draw: int
    label: str
    time: float
    """When the reply came, in seconds since 1970."""
    text: str
    finish: str
    model: str
    input_tokens: int | None
    output_tokens: int | None
    usd: float | None

    @property
    def reply(self) -> Reply:
        """The reply itself."""
        return Reply(
            self.text, self.finish, self.model, self.input_tokens, self.output_tokens, self.usd
        )


def short_hash(text: str) -> str:
    """Return 128 bits of SHA-256, as hex."""
    return sha256(text.encode()).hexdigest()[:32]


def hash_messages(messages: Sequence[Message]) -> str:
    """Return the hash of the messages, which identifies a prompt; of images, of their content."""
    return short_hash(f"[{', '.join(map(_dumped, messages))}]")


def _dumped(message: Message) -> str:
    if not message.images:
        return _dumped_text(message.role, message.content)
    shown = [hash_image(image) for image in message.images]
    return json.dumps([message.role, message.content, shown])


@lru_cache(maxsize=1024)  # system messages and examples are the same in every request
def _dumped_text(role: str, content: str) -> str:
    return json.dumps([role, content])


@dataclass(frozen=True)
class RequestRecord:
    """What a ledger stores about a request; the messages only as a hash."""

    key: str
    """Identifies the reply: a hash of the model, the messages and the draw."""
    identity: str
    prompt: str
    draw: int
    label: str

    def entry(self, reply: Reply) -> Entry:
        """Return the entry for a reply that has just come."""
        return Entry(**vars(self), time=round(time.time(), 3), **vars(reply))


def record_of(identity: str, request: Request) -> RequestRecord:
    """Return what a ledger stores about a request to the chat model with this identity."""
    model, prompt = short_hash(identity), hash_messages(request.messages)
    return RequestRecord(
        key_of(model, prompt, request.draw), model, prompt, request.draw, request.label
    )


def key_of(model: str, prompt: str, draw: int) -> str:
    """Return the key of a reply, by the hashes of its chat model and of its messages."""
    return short_hash(f"{model} {prompt} {draw}")


_KINDS = {field.name: str(field.type) for field in fields(Entry)}
_KEY = re.compile(r"[0-9a-f]{32}")
_MOST = 2.0**63  # limit of a number in a ledger; the comparison refuses NaN, too


def read_entry(row: Mapping[str, Any]) -> Entry:
    """Return the entry in a row. Raises TypeError or ValueError where it is none."""
    given = {name: value for name, value in row.items() if name in _KINDS}
    for name, value in given.items():
        if not _fits(value, _KINDS[name]):
            raise TypeError(f"`{name}` is {type(value).__name__} {reprlib.repr(value)}")
    entry = Entry(**given)
    if not _KEY.fullmatch(entry.key):
        raise ValueError(f"`key` is {reprlib.repr(entry.key)}")
    return entry


def _fits(value: object, kind: str) -> bool:
    """Return whether a value has the type of a field."""
    if value is None:
        return kind.endswith(" | None")
    if kind.startswith("str"):
        return isinstance(value, str)
    numbers = int if kind.startswith("int") else int | float
    return isinstance(value, numbers) and not isinstance(value, bool) and 0 <= value < _MOST


def read_line(line: bytes, where: str) -> Entry:
    """Return the entry in a line of JSON, as ledgers were kept before they were databases."""
    try:
        return read_entry(json.loads(line))
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} is no line of a ledger ({error}); remove that line: its reply is then asked "
            "for again"
        ) from error
