"""Replies from a file, so that nothing is paid for twice; missing replies can be requested.

The file is a ledger, such as that of an earlier run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llavakit import Build, ChatError, ChatModel, Message, Options, Reply, Use
from llavakit_plugins.generation.requests.ledger import Ledger, Request, hash_messages, record_of


class ReplayOptions(Options):
    path: Path
    """A file of replies, as `generate` leaves in `ledger.sqlite`, or its lines of JSON."""
    record: Use[ChatModel] | None = None
    """The chat model for replies that the file lacks; they are added to the file."""


class Replay(ChatModel):
    """Returns the replies of a file by messages and draw, of any model."""

    name = "replay"
    Options = ReplayOptions

    def __init__(self, options: ReplayOptions, *, build: Build) -> None:
        self.options = options
        self._model = None if options.record is None else build(options.record)
        self._ledger: Ledger | None = None
        if self._model is not None:
            self.reply_limit = self._model.reply_limit

    @classmethod
    def missing(cls, options: ReplayOptions) -> str | None:
        if options.record is None and not options.path.is_file():
            return f"there is no file of replies {options.path}; record one with `record`"
        return None

    @property
    def identity(self) -> str:
        return f"replay {self._model.identity if self._model else ''}"

    def complete(self, messages: Sequence[Message]) -> str:
        async def once() -> str:
            try:
                return (await self.reply(messages)).text
            finally:
                await self.close()

        return asyncio.run(once())

    async def reply(self, messages: Sequence[Message], draw: int = 0) -> Reply:
        ledger = self._open()
        # by messages and draw, not by the model: a file that another model wrote can be replayed
        entry = ledger.reply_to(hash_messages(messages), draw)
        if entry is not None:
            return replace(entry.reply, usd=0.0)  # it was paid for when it was recorded
        if self._model is None:
            last = messages[-1].content if messages else ""
            raise ChatError(
                f"{self.options.path} has no reply (draw {draw}) to these messages, the last of "
                f"which begins {last[:60]!r}; it was recorded with other prompts, contexts or "
                'kinds: record them again with `record = { use = "openai", ... }`'
            )
        reply = await self._model.reply(messages, draw)
        fresh = record_of(self._model.identity, Request(tuple(messages), draw)).entry(reply)
        await ledger.write(fresh)
        return reply

    def halt(self) -> None:
        if self._model is not None:
            self._model.halt()

    def count(self, messages: Sequence[Message]) -> int:
        return self._model.count(messages) if self._model else super().count(messages)

    def price(self, input_tokens: int, output_tokens: int) -> float | None:
        return self._model.price(input_tokens, output_tokens) if self._model else 0.0

    async def close(self) -> None:
        if self._model is not None:
            await self._model.close()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _open(self) -> Ledger:
        if self._ledger is None:
            if sentence := self.missing(self.options):
                raise ChatError(sentence)
            self._ledger = Ledger(self.options.path, writable=self._model is not None)
        return self._ledger
