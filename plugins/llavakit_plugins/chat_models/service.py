"""One account at a service with OpenAI's protocol: its client, and the meaning of its answers."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from llavakit import ChatError, DataError, Message, Reply, ReplyError, did_you_mean, shown
from llavakit_plugins.chat_models.faults import (
    Complaint,
    Fault,
    Refused,
    Withheld,
    read_complaint,
)
from llavakit_plugins.chat_models.options import OWN_URL, OpenAIOptions
from llavakit_plugins.chat_models.pacing import Pace, retry_after
from llavakit_plugins.chat_models.secret import read_key, redact
from llavakit_plugins.generation.requests.pictures import data_url
from llavakit_plugins.generation.requests.prices import Price, price_list

if TYPE_CHECKING:
    import openai

_LONGEST_COMPLAINT = 300
_MOST_TOKENS = 10_000_000  # that a service can have read or written for one request
_LONGEST_NUMBER = 30  # digits; Python reads no more than 4300 at once
LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")
_UNKNOWN = re.compile(
    r"unsupported|not supported|unknown|unrecogni[sz]ed|unexpected|extra (?:field|input)|"
    r"not (?:permitted|allowed)|deprecated",
    re.IGNORECASE,
)
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Service:
    """Sends each request once; the caller decides whether to try again."""

    def __init__(self, options: OpenAIOptions) -> None:
        self.options = options
        self.pace: Pace | None = None
        """Of the requests of one client."""
        own = options.base_url == OWN_URL
        self.limit_field = options.limit_field or LIMIT_FIELDS[own]
        self._limit_switched = False
        self.where = shown(options.base_url)
        """The address as it may be shown."""
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

                from llavakit_plugins.chat_models.bounded import BoundedClient
            except ImportError as error:
                raise ChatError(
                    "the chat model `openai` needs its client, which cannot be imported "
                    f"({error!s:.300}): pip install 'llavakit[openai]'"
                ) from error
            self._client = openai.AsyncOpenAI(
                api_key=self.key or "none",
                base_url=self.options.base_url,
                # retries are ours: the client's own would count
                # for one request alone, and ignore the rates
                max_retries=0,
                timeout=self.options.timeout,
                default_headers={"Accept-Encoding": "gzip"},
                http_client=BoundedClient(),
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
        """Return a request's body. Raises ReplyError for a message that no service can be sent."""
        o = self.options
        # with one seed for all draws, a second attempt would get the reply that was rejected
        seed = None if o.seed is None else o.seed + draw
        settings = {"temperature": o.temperature, "top_p": o.top_p, "seed": seed}
        body = {
            "model": o.model,
            "messages": [{"role": m.role, "content": self._content(m)} for m in messages],
            self.limit_field: o.max_tokens,
            **{name: value for name, value in settings.items() if value is not None},
            **o.extra,
        }
        left_out = [name for name, value in o.extra.items() if value in (None, "null")]
        return {name: value for name, value in body.items() if name not in left_out}

    def _content(self, message: Message) -> str | list[dict[str, Any]]:
        """Return a message's text; with images, the list of parts that the protocol has for it."""
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise ReplyError(
                "a message cannot be sent, since it is cut within a character "
                f"({error.reason}); fix the text",
                lasting=True,
            ) from None
        if not message.images:
            return message.content
        o = self.options
        detail = {} if o.detail is None else {"detail": o.detail}
        try:
            urls = [
                data_url(image, edge=o.image_edge, most_bytes=o.image_bytes)
                for image in message.images
            ]
        except DataError as error:
            raise ReplyError(f"a message cannot be sent: {error}", lasting=True) from None
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url, **detail}} for url in urls
        ]
        return [*parts, {"type": "text", "text": message.content}]

    async def call(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return what one call gives.

        Raises Fault where another attempt may help, ReplyError where this request alone has no
        answer, ChatError where no request can have one.
        """
        import openai

        try:
            # of the whole call: the client's own limit is on each piece that comes
            async with asyncio.timeout(self.options.timeout):
                return await ask()
        except TimeoutError:
            raise Fault(f"no answer within {self.options.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise await self._explained(error) from None
        except Exception as error:  # clients raise errors of many kinds for a broken answer
            known: BaseException = error
            while not isinstance(known, ChatError | Fault) and known.__cause__ is not None:
                known = known.__cause__  # the official client may have wrapped it
            if isinstance(known, ChatError):
                raise known from None
            if isinstance(known, Fault):
                raise Fault(self.clean(str(known))) from None
            raise Fault(self.clean(f"the answer is not to be read: {error!r}")) from error

    # -- what it answers ---------------------------------------------------------------------------

    def read(self, data: bytes) -> Reply:
        """Return the reply that a response holds. Raises Fault where it holds none."""
        return self.reply_of(self.table(data))

    def table(self, data: bytes) -> Any:
        """Return what is in JSON. Raises Fault where it is none."""
        try:
            return json.loads(data.decode("utf-8"), parse_int=_number)
        except (ValueError, RecursionError) as error:
            raise Fault(self.clean(f"the answer is no JSON: {error}")) from None

    def reply_of(self, table: Any) -> Reply:
        """Return the reply in the body of a chat completion. Raises Fault where it holds none."""
        try:
            choice = table["choices"][0]
            message = choice["message"]
            refusal = message.get("refusal") or ""
            text = _text(message.get("content")) or refusal
            if not isinstance(text, str) or not isinstance(refusal, str):
                raise TypeError("its content is no text")
            ended = choice.get("finish_reason")
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            detail = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            if isinstance(table, Mapping) and table.get("error"):
                detail = read_complaint(table["error"]).said
            raise Fault(self.clean(f"the answer holds no reply: {detail}")) from None
        finish = "refusal" if refusal else ended if isinstance(ended, str) and ended else "stop"
        model = table.get("model")
        sent, made = _counts(table.get("usage"))
        reply = Reply(
            self.clean(text, longest=None),
            self.clean(finish),
            self.clean(model if isinstance(model, str) and model else self.options.model),
            sent,
            made,
        )
        if sent is None or made is None:
            return reply
        return replace(reply, usd=self.price(sent, made))

    # -- what went wrong ---------------------------------------------------------------------------

    async def _explained(self, error: openai.APIStatusError) -> Exception:
        """Return what an answer that is an error means for its request, or for all."""
        status = error.status_code
        complaint = read_complaint(error.body, f"no reason given, by {type(error).__name__}")
        verdict = self.judge(status, complaint)
        if verdict is None:
            return await self.fatal(status, complaint)
        if isinstance(verdict, Fault):
            pause = retry_after(error.response.headers)
            busy = status == 429 or pause is not None
            return Fault(str(verdict), pause, busy=busy)
        return verdict

    def judge(self, status: int, complaint: Complaint) -> Exception | None:
        """Return what a complaint means for its request; None where it ends the job.

        A Fault may pass; Withheld and Refused are of this request alone.
        """
        said, code = self.clean(f"status {status}: {complaint.said}"), complaint.code
        if 400 <= status < 500 and complaint.filtered:
            return Withheld(said, lasting=True)
        # these would come for every other request, too: the job ends before they are all tried
        if status in (401, 402, 403, 404) or code in (
            "insufficient_quota", "invalid_api_key", "model_not_found",
        ):  # fmt: skip
            return None
        if status < 400 or status in (408, 409, 425, 429) or status >= 500:
            return Fault(said)
        return Refused(f"{self.where} refuses a request: {said}", complaint)

    def learn(self, complaint: Complaint, sent: str | None = None) -> bool:
        """Take from a refusal how the service calls the longest reply; say whether to ask again.

        `sent` is the name that the refused request had; None where that is not known. OpenAI's
        newer models, also at Azure, take the new name alone; older servers the old one.
        """
        said = f"{complaint.code.replace('_', ' ')} {complaint.said}"
        blamed = sent or complaint.param
        if blamed not in LIMIT_FIELDS:
            found = re.search(rf"\b({'|'.join(LIMIT_FIELDS)})\b", complaint.said)
            blamed = found[0] if found else ""
        other = LIMIT_FIELDS[blamed == LIMIT_FIELDS[0]]
        if not blamed or blamed not in f"{complaint.param} {complaint.said}":
            return False
        if not (_UNKNOWN.search(said) or other in complaint.said):
            return False
        if blamed == self.limit_field and not self._limit_switched and not self.options.limit_field:
            self._limit_switched, self.limit_field = True, other
            _log.info("%s calls `%s` `%s`", self.where, blamed, other)
        return blamed != self.limit_field and blamed not in self.options.extra

    async def fatal(self, status: int, complaint: Complaint) -> ChatError:
        """Return what ends the job: the key, the model or the address is wrong."""
        o = self.options
        said, where = self.clean(complaint.said), self.where
        if status in (401, 403) or complaint.code == "invalid_api_key":
            credential = str(o.key_file) if o.key_file else f"environment variable {o.key_env}"
            credential = "`keyless = true`" if o.keyless else f"the key in {credential}"
            return ChatError(f"{where} does not take {credential}: {said}")
        if status == 402 or complaint.code == "insufficient_quota":
            return ChatError(
                f"the account at {where} has no credit left: {said}; add some and run again "
                "with --resume"
            )
        served = await self.served()
        if o.model in served:
            return ChatError(
                f"{where} lists the model `{o.model}` but has no chat completions of it: {said}; "
                "check `base_url` (most end in /v1)"
            )
        hint = "check `model` and `base_url` (most end in /v1)"
        if served:
            hint = did_you_mean(o.model, served, f"it serves: {', '.join(sorted(served)[:20])}")
        return ChatError(f"{where} has no model `{o.model}`: {said}; {self.clean(hint)}")

    async def served(self) -> list[str]:
        """Return the models that there are; none where that is not to be known."""
        with suppress(Exception):  # only to say more; what is wrong is known already
            async with asyncio.timeout(min(self.options.timeout, 10)):
                table: Any = await self.client().get("/models", cast_to=object)
            names = [row.get("id") for row in table["data"]]
            return [name for name in names if isinstance(name, str)]
        return []

    def clean(self, text: str, longest: int | None = _LONGEST_COMPLAINT) -> str:
        """Return a text of the service without the key; what is to be shown not endless, on one
        line and without control characters."""
        text = redact(text, self.key)
        if longest is None:
            return text
        text = shown(" ".join(text.split()))
        return text if len(text) <= longest else f"{text[:longest]}…"


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else float(digits)


def _text(content: Any) -> Any:
    """Return the text of a message: itself, or the parts of a list that are no thinking."""
    if not (isinstance(content, list) and content):
        return content
    parts = [part for part in content if part["type"] not in ("thinking", "reasoning")]
    return "".join(part["text"] for part in parts)


def _counts(usage: Any) -> list[int | None]:
    """Return the tokens of a request and of its reply, where a service says what can be."""
    usage = usage if isinstance(usage, Mapping) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return [
        count if type(count) is int and 0 <= count <= _MOST_TOKENS else None for count in counts
    ]
