"""What a generator is that asks a chat model: what it asks, and how it reads the reply."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llavakit import ChatModel, DataError, Generator, ImageContext, Message, Reply, Turn
from llavakit.contracts.data import ResponseKind


@dataclass(frozen=True)
class Verdict:
    """What is made of a reply."""

    outcome: Literal["accepted", "repaired", "rejected"]
    turns: tuple[Turn, ...] = ()
    """The conversation; none where it is rejected."""
    notes: tuple[str, ...] = ()
    """How it was repaired, or why it was rejected: always in the same words, to be counted."""


class PromptedGenerator(Generator):
    """A generator in two halves, between which whoever runs it can wait, save and count."""

    chat: ChatModel

    @abstractmethod
    def messages(self, context: ImageContext, kind: ResponseKind) -> tuple[Message, ...]:
        """Return what to ask."""

    @abstractmethod
    def read(self, context: ImageContext, kind: ResponseKind, reply: Reply) -> Verdict:
        """Return what the reply is worth; the same for the same reply."""

    @abstractmethod
    def expected_reply(self, kind: ResponseKind) -> str:
        """Return a reply of usual length, to reckon its price."""

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
