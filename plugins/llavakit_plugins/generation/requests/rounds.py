"""Collects the requests of generators instead of sending them: for batch services, and for plans.

A generator is called as if its replies were there. Where one is missing its call ends, and the
request is noted; once the reply has come the generator is called again, up to its next request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from llavakit import ChatModel, Message, Reply, ReplyError
from llavakit_plugins.generation.requests.booking import counts_all
from llavakit_plugins.generation.requests.ledger import Ledger, Request, record_of

MOST = 20
"""Requests of one conversation in a plan."""


class Waiting(BaseException):
    """A generator's call ends here. No Exception: generators catch those."""


class Round(ABC):
    """Answers requests without sending any."""

    @abstractmethod
    def reply(self, chat: ChatModel, request: Request) -> Reply:
        """Return the reply to a request, or raise Waiting."""


@dataclass
class Collected(Round):
    """Answers from the ledger, and notes the requests that are still to be sent."""

    ledger: Ledger
    unanswered: Mapping[str, str]
    """Why requests get no reply, by key."""
    refused: frozenset[str] = frozenset()
    """Keys of those that will never get one."""
    wanted: dict[str, tuple[ChatModel, dict[str, Request]]] = field(default_factory=dict)
    """Requests to be sent, by key, and by the identity of their chat model."""
    served: Counter[str] = field(default_factory=Counter)
    """How many requests of each conversation were answered."""

    def reply(self, chat: ChatModel, request: Request) -> Reply:
        key = record_of(chat.identity, request).key
        entry = self.ledger.get(key)
        if entry is None and key not in self.unanswered:
            self.wanted.setdefault(chat.identity, (chat, {}))[1][key] = request
            raise Waiting
        self.served[request.label] += 1
        if entry is None:
            raise ReplyError(self.unanswered[key], lasting=key in self.refused)
        return entry.reply


@dataclass
class Invented(Round):
    """Answers with invented text, and counts the tokens."""

    text: str
    sent: Counter[ChatModel] = field(default_factory=Counter)
    made: Counter[ChatModel] = field(default_factory=Counter)
    known: bool = True
    """Whether it is known what all images of the requests count as."""
    requests: int = 0
    left: int = MOST
    """Requests that the conversation may still have: it may ask again until a reply suits it."""

    def reply(self, chat: ChatModel, request: Request) -> Reply:
        if self.left <= 0:
            raise Waiting
        self.left -= 1
        self.requests += 1
        self.known = self.known and counts_all(chat, request.messages)
        self.sent[chat] += chat.count(request.messages)
        self.made[chat] += chat.count([Message("assistant", self.text)])
        return Reply(self.text)
