"""Chat models of services with OpenAI's chat completions: OpenAI, Azure, vLLM, Ollama and others.

The official client sends the requests. Pauses, rates and retries are our own, because they concern
all requests together: when the service asks for a pause, every request waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from llavakit import ChatModel, DataError, ImageSource, Message, Reply, ReplyError
from llavakit_plugins.chat_models.batches import OpenAIBatches
from llavakit_plugins.chat_models.faults import Fault, Refused, Withheld
from llavakit_plugins.chat_models.options import OpenAIOptions as OpenAIOptions
from llavakit_plugins.chat_models.pacing import Halted, backoff
from llavakit_plugins.chat_models.service import LIMIT_FIELDS, Service
from llavakit_plugins.generation.requests.image_tokens import image_tokens
from llavakit_plugins.generation.requests.ledger import hash_messages, short_hash
from llavakit_plugins.generation.requests.pictures import size_of
from llavakit_plugins.generation.requests.tokens import Counter, counter_for

if TYPE_CHECKING:
    import openai

_PATIENT_TRIES = 3  # of one request, before it is said
_PATIENT_SECONDS = 10.0  # of one pause, before it is said
_log = logging.getLogger(__name__)


class OpenAI(ChatModel):
    """Asks a service that speaks OpenAI's protocol."""

    name = "openai"
    Options = OpenAIOptions

    def __init__(self, options: OpenAIOptions) -> None:
        self.options = options
        self.reply_limit = options.max_tokens
        self._service = Service(options)
        self.batches = OpenAIBatches(self._service) if options.batch else None
        self._said = False

    # -- what it would cost ------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        o = self.options
        decides = [o.model, o.temperature, o.top_p, o.seed, o.max_tokens, o.extra]
        seen = {
            name: getattr(o, name)
            for name in ("detail", "image_edge", "image_bytes")
            if getattr(o, name) != type(o).model_fields[name].default
        }  # left out where usual: replies of before there were images stay those of this model
        return f"openai {json.dumps([*decides, seen] if seen else decides, sort_keys=True)}"

    @cached_property
    def counter(self) -> Counter:
        """Counts the model's tokens."""
        return counter_for(self.options.model)

    def count(self, messages: Sequence[Message]) -> int:
        images = (self._image_tokens(image) for m in messages for image in m.images)
        return self.counter.messages(messages) + sum(tokens or 0 for tokens in images)

    def counts(self, messages: Sequence[Message]) -> bool:
        """Say whether `count` knows what the images of these messages count as."""
        return all(self._image_tokens(image) is not None for m in messages for image in m.images)

    def _image_tokens(self, image: ImageSource) -> int | None:
        o = self.options
        if o.image_tokens is not None:
            return o.image_tokens
        try:
            size = size_of(image, o.image_edge)
        except DataError:  # it will not be sent, with a sentence that says why
            return 0
        return image_tokens(o.model, *size, low=o.detail == "low")

    def price(self, input_tokens: int, output_tokens: int) -> float | None:
        return self._service.price(input_tokens, output_tokens)

    # -- asking ------------------------------------------------------------------------------------

    def complete(self, messages: Sequence[Message]) -> str:
        async def once() -> Reply:
            try:
                return await self.reply(messages)
            finally:
                await self.close()

        reply = asyncio.run(once())
        if not reply.text:
            raise ReplyError(f"`{self.options.model}` gives an empty reply ({reply.finish})")
        return reply.text

    def served(self) -> list[str]:
        """Return the models that the service lists; none where it lists none."""

        async def once() -> list[str]:
            try:
                return [self._service.clean(name) for name in await self._service.served()]
            finally:
                await self.close()

        return asyncio.run(once())

    async def reply(self, messages: Sequence[Message], draw: int = 0) -> Reply:
        try:
            return await self._reply(messages, draw)
        except Halted:
            raise ReplyError("not sent, since the job stops") from None

    def halt(self) -> None:
        if self._service.pace is not None:
            self._service.pace.halt()

    async def _reply(self, messages: Sequence[Message], draw: int) -> Reply:
        client = self._service.client()
        pace = self._service.pace
        assert pace is not None
        tokens = 0
        if self.options.tokens_per_minute:
            tokens = self.count(messages) + self.options.max_tokens
        tries, failures, waited = 0, 0, 0.0
        while True:
            await pace.turn(tokens)
            try:
                return await self._attempt(client, messages, draw)
            except Fault as fault:
                tries += 1
                failures += not fault.busy
                pause = fault.pause or 0.0
                # a service that asks for no pause again and again gets one all the same
                if fault.pause is None or tries > 1:
                    pause = max(pause, backoff(tries, self.options.backoff))
                if failures > self.options.retries:
                    raise ReplyError(
                        f"{self._service.where} does not answer after {failures} tries: {fault}; "
                        "run again later with --resume"
                    ) from None
                if fault.busy and waited + pause > self.options.patience:
                    raise ReplyError(
                        f"{self._service.where} is busy for longer than `patience` = "
                        f"{self.options.patience:g} s: {fault}; run again later with --resume"
                    ) from None
                if fault.busy:
                    waited += pause
                    pace.hold(pause)  # all requests, not this one alone
                self._say(fault, tries, pause)
                await pace.rest(pause)

    def _say(self, fault: Fault, tries: int, pause: float) -> None:
        """Log that a request is sent again, if the user would otherwise wonder about the time."""
        long = (tries >= _PATIENT_TRIES or pause >= _PATIENT_SECONDS) and not self._said
        self._said |= long
        _log.log(
            logging.WARNING if long else logging.INFO,
            "%s: %s; asking again in %.1f s",
            *(self._service.where, fault, pause),
        )

    async def close(self) -> None:
        await self._service.close()

    async def _attempt(
        self, client: openai.AsyncOpenAI, messages: Sequence[Message], draw: int
    ) -> Reply:
        import openai

        if any(message.images for message in messages):  # which takes time to read and encode
            body = await asyncio.to_thread(self._service.body, messages, draw)
        else:
            body = self._service.body(messages, draw)
        # a proxy that knows this header answers a repeated request without doing it twice
        mark = short_hash(f"{self.identity} {hash_messages(messages)} {draw}")

        async def post() -> bytes:
            # its typed method takes more than half of the time looking at the messages' types
            answer = await client.post(
                "/chat/completions",
                cast_to=openai.HttpxBinaryResponseContent,
                body=body,
                options={"headers": {"Idempotency-Key": mark}},
            )
            return answer.content

        try:
            return self._service.read(await self._service.call(post))
        except Withheld:
            return Reply("", "content_filter", self.options.model, 0, 0, 0.0)
        except Refused as refused:
            # sent again at most once: `learn` takes the
            # other name only where it has not done so before
            sent = next((name for name in LIMIT_FIELDS if name in body), "")
            if sent and self._service.learn(refused.complaint, sent):
                return await self._attempt(client, messages, draw)
            raise
