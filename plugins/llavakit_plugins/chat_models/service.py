"""One account at a service that speaks OpenAI's protocol: its client, and what its answers say."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llavakit import ChatError, Message, Reply, ReplyError, did_you_mean
from llavakit_plugins.chat_models.faults import Fault
from llavakit_plugins.chat_models.options import OWN_URL, OpenAIOptions
from llavakit_plugins.chat_models.pacing import Pace, retry_after
from llavakit_plugins.chat_models.secret import read_key, redact
from llavakit_plugins.generation.requests.prices import Price, price_list

if TYPE_CHECKING:
    import openai

_LONGEST_COMPLAINT = 300


class Service:
    """Sends what it is given, once; who calls decides whether to try again."""

    def __init__(self, options: OpenAIOptions) -> None:
        self.options = options
        self.pace: Pace | None = None
        """Of the requests of one client."""
        self._client: openai.AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @cached_property
    def _price(self) -> Price | None:
        if self.options.price is not None or self.options.base_url != OWN_URL:
            return self.options.price
        return price_list().find(self.options.model)

    def price(self, input_tokens: int, output_tokens: int) -> float | None:
        if self._price is None:
            return None
        return self._price.of(input_tokens, output_tokens, batch=self.options.batch)

    @cached_property
    def key(self) -> str:
        """The key, or nothing where the service wants none."""
        return "" if self.options.keyless else read_key(self.options.key_env, self.options.key_file)

    def client(self) -> openai.AsyncOpenAI:
        """Return the official client, one for each event loop. Raises ChatError without a key."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            try:
                import openai
            except ImportError as error:
                raise ChatError(
                    "the chat model `openai` needs its client: pip install 'llavakit[openai]'"
                ) from error
            self._client = openai.AsyncOpenAI(
                api_key=self.key or "none",
                base_url=self.options.base_url,
                max_retries=0,
                timeout=self.options.timeout,
                http_client=openai.DefaultAioHttpClient() if find_spec("aiohttp") else None,
            )
            self.pace = Pace(self.options.requests_per_minute, self.options.tokens_per_minute)
            self._loop = loop
        return self._client

    async def close(self) -> None:
        """Close the client of the running event loop."""
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.close()
        self._client = None

    def body(self, messages: Sequence[Message], draw: int) -> dict[str, Any]:
        """Return a request's body."""
        o = self.options
        limit = "max_completion_tokens" if o.base_url == OWN_URL else "max_tokens"
        seed = None if o.seed is None else o.seed + draw
        settings = {"temperature": o.temperature, "top_p": o.top_p, "seed": seed}
        return {
            "model": o.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            limit: o.max_tokens,
            **{name: value for name, value in settings.items() if value is not None},
            **o.extra,
        }

    # -- what it answers ---------------------------------------------------------------------------

    def read(self, data: bytes) -> Reply:
        """Return the reply that a response holds. Raises Fault where it holds none."""
        try:
            table = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise Fault(self.clean(f"the answer is no JSON: {error}")) from None
        return self.reply_of(table)

    def reply_of(self, table: Any) -> Reply:
        """Return the reply in the body of a chat completion. Raises Fault where it holds none."""
        try:
            choice = table["choices"][0]
            message = choice["message"]
            refusal = message.get("refusal")
            text = message.get("content") or refusal or ""
            if not isinstance(text, str):
                raise TypeError("its content is no text")
            finish = "refusal" if refusal else str(choice.get("finish_reason") or "stop")
            usage = table.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            detail = table.get("error", error) if isinstance(table, dict) else error
            raise Fault(self.clean(f"the answer holds no reply: {detail}")) from None
        sent, made = (count if isinstance(count, int) and count >= 0 else None for count in counts)
        reply = Reply(
            self.clean(text, longest=None),
            finish,
            self.clean(str(table.get("model") or self.options.model)),
            sent,
            made,
        )
        if sent is None or made is None:
            return reply
        return replace(reply, usd=self.price(sent, made))

    # -- what went wrong ---------------------------------------------------------------------------

    def explain(self, error: openai.APIStatusError) -> Reply | None:
        """Return the empty reply of a withheld answer, or None where no request can succeed.

        Raises Fault where another attempt may help, ReplyError where it is this request alone.
        """
        status, code = error.status_code, error.code or ""
        said = self.clean(f"status {status}: {_complaint(error)}")
        if status == 400 and ("content_filter" in code or "content_policy" in code):
            return Reply("", "content_filter", self.options.model, 0, 0, 0.0)
        if status in (401, 403, 404) or code in ("insufficient_quota", "model_not_found"):
            return None
        if status in (408, 409, 425, 429) or status >= 500:
            pause = retry_after(error.response.headers)
            raise Fault(said, pause, busy=status == 429 or pause is not None)
        raise ReplyError(f"{self.options.base_url} refuses a request: {said}", lasting=True)

    async def fatal(self, error: openai.APIStatusError) -> ChatError:
        """Return what ends the job: the key, the model or the address is wrong."""
        o = self.options
        said = self.clean(_complaint(error))
        if error.status_code in (401, 403):
            where = str(o.key_file) if o.key_file else f"environment variable {o.key_env}"
            where = "`keyless = true`" if o.keyless else f"the key in {where}"
            return ChatError(f"{o.base_url} does not take {where}: {said}")
        if error.code == "insufficient_quota":
            return ChatError(
                f"the account at {o.base_url} has no credit left: {said}; add some and run again "
                "with --resume"
            )
        served: list[str] = []
        with suppress(Exception):  # only to say more; what is wrong is known already
            async with asyncio.timeout(min(o.timeout, 10)):
                served = [model.id async for model in self.client().models.list()]
        hint = "check `model` and `base_url` (most end in /v1)"
        if served:
            hint = did_you_mean(o.model, served, f"it serves: {', '.join(sorted(served)[:20])}")
        return ChatError(f"{o.base_url} has no model `{o.model}`: {said}; {self.clean(hint)}")

    def clean(self, text: str, longest: int | None = _LONGEST_COMPLAINT) -> str:
        """Return a text of the service without the key, and not endless."""
        text = redact(text, self.key)
        return text if longest is None or len(text) <= longest else f"{text[:longest]}…"


def _complaint(error: openai.APIStatusError) -> str:
    """Return what the service said, on one line."""
    body = error.body
    message = body.get("message") if isinstance(body, Mapping) else None
    return re.sub(r"\s+", " ", str(message or error.message)).strip()
