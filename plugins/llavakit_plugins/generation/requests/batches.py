"""What a chat model offers that also takes requests by the thousand and answers within a day."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from llavakit import Reply, ReplyError
from llavakit_plugins.generation.requests.ledger import Request


@dataclass(frozen=True)
class BatchState:
    """How far a batch is."""

    done: bool
    """Whether nothing more will come; the replies can be collected."""
    answered: int
    total: int
    status: str
    """As the service says it."""
    complaint: str = ""
    """Why the service refused it, where it did."""


class SendAgain(ReplyError):
    """A request that has an answer in another form, which the service knows by now."""


class BatchService(ABC):
    """A queue of batches. `mark` names a job, so that its batches are found again after a crash."""

    size: int
    """Most requests of one batch."""
    poll_seconds: float

    @abstractmethod
    async def submit(self, mark: str, requests: Mapping[str, Request]) -> str:
        """Hand in requests by key; return the batch's id."""

    @abstractmethod
    async def find(self, mark: str) -> list[str]:
        """Return the ids of the batches handed in under a mark, oldest first."""

    @abstractmethod
    async def state(self, batch: str) -> BatchState:
        """Return how far a batch is."""

    @abstractmethod
    def collect(self, batch: str) -> AsyncIterator[tuple[str, Reply | ReplyError]]:
        """Yield each key with its reply, or with the reason why there is none."""
