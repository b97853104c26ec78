"""The interface of a generator with a chat model: its messages, and how it reads a reply."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llavakit import ChatModel, DataError, Generator, ImageContext, Message, Reply, Turn
from llavakit.contracts.data import ResponseKind


@dataclass(frozen=True)
class Verdict:
    """The judgement on one reply."""

    outcome: Literal["accepted", "repaired", "rejected"]
    turns: tuple[Turn, ...] = ()
    """The conversation; empty if the reply is rejected."""
    notes: tuple[str, ...] = ()
    """How the reply was repaired, or why it was rejected. Always the same words for the same
    reason, so that reasons can be counted."""


class PromptedGenerator(Generator):
    """A generator in two halves. Between them the caller can send many requests at once, save the
    replies and count the cost."""

    chat: ChatModel
    images: Path | None = None
    """The folder of the images, where the step names one."""

    @property
    def shows_images(self) -> bool:
        """Whether its messages have the context's image, below the folder `images`."""
        return False

    @abstractmethod
    def messages(self, context: ImageContext, kind: ResponseKind) -> tuple[Message, ...]:
        """Return the messages of one request."""

    @abstractmethod
    def read(self, context: ImageContext, kind: ResponseKind, reply: Reply) -> Verdict:
        """Return the verdict on a reply; the same reply always gets the same verdict."""

    @abstractmethod
    def expected_reply(self, kind: ResponseKind) -> str:
        """Return an example of a reply of usual length, to estimate prices."""

    def generate(self, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        async def once() -> Reply:
            try:
                return await self.chat.reply(self.messages(context, kind))
            finally:
                await self.chat.close()

        verdict = self.read(context, kind, asyncio.run(once()))
        if verdict.outcome == "rejected":
            raise DataError(
                f"the reply on context `{context.id}` ({kind}) cannot be used: "
                f"{'; '.join(verdict.notes)}; ask again, or use the step `generate`, which does"
            )
        return verdict.turns
