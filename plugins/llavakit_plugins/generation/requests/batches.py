"""The interface of a chat model's batch service: thousands of requests, answered within a day."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass

from llavakit import Reply, ReplyError
from llavakit_plugins.generation.requests.ledger import Request


@dataclass(frozen=True)
class BatchState:
    """The state of a batch."""

    done: bool
    """Whether the batch has ended, so that its replies can be collected."""
    answered: int
    total: int
    status: str
    """The status in the service's own words."""
    complaint: str = ""
    """Why the service refused the batch, if it did."""


class SendAgain(ReplyError):
    """The service wants the request in another form, which the chat model has learned from the
    refusal; the same request, sent again, can be answered."""


class Draft(ABC):
    """A batch in the making."""

    @abstractmethod
    def add(self, key: str, request: Request) -> bool:
        """Add a request; False, and nothing is added, where the service takes no more in one batch.

        Raises ReplyError for a request that cannot be sent at all.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of its requests."""

    @abstractmethod
    def close(self) -> None:
        """Forget it."""


class BatchService(ABC):
    """A queue of batches. `mark` identifies a job, so that a crash does not lose its batches."""

    poll_seconds: float
    at_once: int | None = None
    """Most batches on their way; more wait until one has come back."""

    @abstractmethod
    def draft(self) -> Draft:
        """Return an empty batch."""

    @abstractmethod
    async def submit(self, mark: str, draft: Draft) -> str:
        """Submit a batch; return its id."""

    @abstractmethod
    async def find(self, mark: str) -> list[str]:
        """Return the ids of the batches that were submitted under a mark, oldest first."""

    @abstractmethod
    async def state(self, batch: str) -> BatchState:
        """Return the state of a batch."""

    @abstractmethod
    def collect(self, batch: str) -> AsyncIterator[tuple[str, Reply | ReplyError]]:
        """Yield each key with its reply, or with the error that explains why there is none."""
