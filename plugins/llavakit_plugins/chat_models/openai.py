"""Any service that speaks OpenAI's chat completions: OpenAI, Azure, vLLM, Ollama and others.

The official client sends the requests; pauses, rates and retries are ours, since they concern all
requests together: when the service asks for a pause, every request waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from llavakit import ChatError, ChatModel, Message, Options, Reply, ReplyError
from llavakit_plugins.chat_models.pacing import Halted, Pace, backoff, retry_after
from llavakit_plugins.chat_models.secret import read_key, redact
from llavakit_plugins.generation.requests.ledger import hash_messages, short_hash
from llavakit_plugins.generation.requests.prices import Price, price_list
from llavakit_plugins.generation.requests.tokens import Counter, counter_for

if TYPE_CHECKING:
    import openai

OWN_URL = "https://api.openai.com/v1"
_LONGEST_COMPLAINT = 300
_PATIENT_TRIES = 3  # of one request, before it is said
_PATIENT_SECONDS = 10.0  # of one pause, before it is said
_log = logging.getLogger(__name__)


def _plain_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write it as https://HOST/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("it may hold no password or key; use `key_env` or `key_file`")
    return url


class OpenAIOptions(Options):
    model: str = Field(min_length=1)
    base_url: Annotated[str, AfterValidator(_plain_url)] = OWN_URL
    """Where the service is; http://localhost:11434/v1 is Ollama, for example."""
    key_env: str = Field(default="OPENAI_API_KEY", pattern=r"^[A-Z_][A-Z0-9_]*$")
    """The environment variable that holds the key."""
    key_file: Path | None = None
    """A file that holds the key, instead."""
    keyless: bool = False
    """Whether the service wants no key."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    max_tokens: int = Field(default=1024, ge=1)
    """Longest reply."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More fields of the request's body, as the service defines them."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds for one whole request."""
    retries: int = Field(default=6, ge=0)
    """How often a request is sent again after a failure."""
    backoff: float = Field(default=1.0, gt=0)
    """Seconds before the first of them; each later pause is twice as long, up to a minute."""
    patience: float = Field(default=600.0, ge=0)
    """Longest time in seconds that one request waits for a service that says it is busy."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    price: Price | None = None
    """USD for a million tokens, where the packaged list is wrong or has none."""
    batch: bool = False
    """Whether to use the batch service: half the price, within a day."""
    batch_size: int = Field(default=10_000, ge=1, le=50_000)
    poll_seconds: float = Field(default=60.0, gt=0)


class Fault(Exception):
    """One attempt that failed and may be made again."""

    def __init__(self, message: str, pause: float | None = None, busy: bool = False) -> None:
        super().__init__(message)
        self.pause = pause
        """Seconds that the service asks to wait."""
        self.busy = busy


class OpenAI(ChatModel):
    """Asks a service that speaks OpenAI's protocol."""

    name = "openai"
    Options = OpenAIOptions

    def __init__(self, options: OpenAIOptions) -> None:
        self.options = options
        self.reply_limit = options.max_tokens
        self.batches: Any = None
        if options.batch:
            from llavakit_plugins.chat_models.batches import OpenAIBatches

            self.batches = OpenAIBatches(self)
        self._client: openai.AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pace: Pace | None = None
        self._said = False

    # -- what it would cost ------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        o = self.options
        decides = [o.model, o.temperature, o.top_p, o.seed, o.max_tokens, o.extra]
        return f"openai {json.dumps(decides, sort_keys=True)}"

    @cached_property
    def counter(self) -> Counter:
        """Counts the model's tokens."""
        return counter_for(self.options.model)

    def count(self, messages: Sequence[Message]) -> int:
        return self.counter.messages(messages)

    @cached_property
    def _price(self) -> Price | None:
        if self.options.price is not None or self.options.base_url != OWN_URL:
            return self.options.price
        return price_list().find(self.options.model)

    def price(self, input_tokens: int, output_tokens: int) -> float | None:
        if self._price is None:
            return None
        return self._price.of(input_tokens, output_tokens, batch=self.options.batch)

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

    async def reply(self, messages: Sequence[Message], draw: int = 0) -> Reply:
        try:
            return await self._reply(messages, draw)
        except Halted:
            raise ReplyError("not sent, since the job stops") from None

    def halt(self) -> None:
        if self._pace is not None:
            self._pace.halt()

    async def _reply(self, messages: Sequence[Message], draw: int) -> Reply:
        client = self.client()
        assert self._pace is not None
        tokens = 0
        if self.options.tokens_per_minute:
            tokens = self.count(messages) + self.options.max_tokens
        tries, failures, waited = 0, 0, 0.0
        while True:
            await self._pace.turn(tokens)
            try:
                return await self._attempt(client, messages, draw)
            except Fault as fault:
                tries += 1
                failures += not fault.busy
                pause = fault.pause or 0.0
                if (
                    fault.pause is None or tries > 1
                ):  # who says `at once` again and again is not heard
                    pause = max(pause, backoff(tries, self.options.backoff))
                if failures > self.options.retries:
                    raise ReplyError(
                        f"{self.options.base_url} does not answer after {failures} tries: {fault}; "
                        "run again later with --resume"
                    ) from None
                if fault.busy and waited + pause > self.options.patience:
                    raise ReplyError(
                        f"{self.options.base_url} is busy for longer than `patience` = "
                        f"{self.options.patience:g} s: {fault}; run again later with --resume"
                    ) from None
                if fault.busy:
                    waited += pause
                    self._pace.hold(pause)  # all requests, not this one alone
                self._say(fault, tries, pause)
                await self._pace.rest(pause)

    def _say(self, fault: Fault, tries: int, pause: float) -> None:
        """Log that a request is sent again; so that nobody wonders, where that takes long."""
        long = (tries >= _PATIENT_TRIES or pause >= _PATIENT_SECONDS) and not self._said
        self._said |= long
        _log.log(
            logging.WARNING if long else logging.INFO,
            "%s: %s; asking again in %.1f s",
            *(self.options.base_url, fault, pause),
        )

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
            self._pace = Pace(self.options.requests_per_minute, self.options.tokens_per_minute)
            self._loop = loop
        return self._client

    @cached_property
    def key(self) -> str:
        """The key, or nothing where the service wants none."""
        return "" if self.options.keyless else read_key(self.options.key_env, self.options.key_file)

    async def close(self) -> None:
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

    async def _attempt(
        self, client: openai.AsyncOpenAI, messages: Sequence[Message], draw: int
    ) -> Reply:
        import openai

        # a proxy that knows this header answers a repeated request without doing it twice
        mark = short_hash(f"{self.identity} {hash_messages(messages)} {draw}")
        try:
            # of the whole request: the client's own limit is on each piece that comes
            async with asyncio.timeout(self.options.timeout):
                # its typed method takes more than half of the time looking at the messages' types
                answer = await client.post(
                    "/chat/completions",
                    cast_to=openai.HttpxBinaryResponseContent,
                    body=self.body(messages, draw),
                    options={"headers": {"Idempotency-Key": mark}},
                )
        except TimeoutError:
            raise Fault(self._too_late()) from None
        except UnicodeEncodeError as error:
            raise ReplyError(
                f"a message cannot be sent, since it is cut within a character ({error.reason}); "
                "mend the text",
                lasting=True,
            ) from None
        except openai.APIStatusError as error:
            refused = self.explain(error)
            if refused is None:
                raise await self.fatal(error) from None
            return refused
        except openai.APIConnectionError as error:  # APITimeoutError is one
            failure = _failure(error)
            if failure is None and isinstance(error, openai.APITimeoutError):
                raise Fault(self._too_late()) from None
            reason = failure or error.__cause__ or error
            raise Fault(self.clean(f"the connection failed: {reason}")) from None
        return self.read(answer.content)

    def _too_late(self) -> str:
        return f"no answer within {self.options.timeout:g} s"

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
        close = get_close_matches(o.model, served, n=1)
        if close:
            hint = f"did you mean `{close[0]}`?"
        elif served:
            hint = f"it serves: {', '.join(sorted(served)[:20])}"
        else:
            hint = "check `model` and `base_url` (most end in /v1)"
        return ChatError(f"{o.base_url} has no model `{o.model}`: {said}; {self.clean(hint)}")

    def clean(self, text: str, longest: int | None = _LONGEST_COMPLAINT) -> str:
        """Return a text of the service without the key, and not endless."""
        text = redact(text, self.key)
        return text if longest is None or len(text) <= longest else f"{text[:longest]}…"


def _failure(error: BaseException) -> OSError | None:
    """Return what the system said of a connection: aiohttp's adapter calls all of it a time-out."""
    behind = error.__cause__ or error.__context__
    if behind is None or (isinstance(behind, OSError) and not isinstance(behind, TimeoutError)):
        return behind
    return _failure(behind)


def _complaint(error: openai.APIStatusError) -> str:
    """Return what the service said, on one line."""
    body = error.body
    message = body.get("message") if isinstance(body, Mapping) else None
    return re.sub(r"\s+", " ", str(message or error.message)).strip()
