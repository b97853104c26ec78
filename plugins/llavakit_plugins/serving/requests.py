"""What a client asks: the body of `/v1/chat/completions`, checked."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llavakit.contracts.model import Sampling
from llavakit_plugins.serving.errors import RequestError
from llavakit_plugins.serving.limits import Limits

_STOPS, _LIKELIEST = 16, 20
# Clients and agents send these without being asked to: a refusal would make them unusable here.
_IGNORED = {
    # they change nothing of an answer
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls", "verbosity", "reasoning_effort",
}  # fmt: skip
_PLAIN: dict[str, tuple[Any, ...]] = {
    # they ask for what the server does not have, unless they have one of these values
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}

_MESSAGE = {"role", "content", "name", "cache_control"}
_PART = {"type", "cache_control"}
_PICTURES = ("image", "image_url", "video", "video_url")
_NAMED = {*_PICTURES, "url", "path", "base64"}  # each of these can name a part's picture
# what clients fill in where they have nothing to say, such as `message.model_dump()`
_NOTHING: tuple[Any, ...] = (None, "", [], {})

Number = Annotated[float, Field(allow_inf_nan=False)]
Body = TypeVar("Body", bound=BaseModel)


class StreamOptions(BaseModel):
    """How an answer is sent in pieces."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for a chat completion, with OpenAI's names, and vLLM's for what it lacks."""

    # strict: a number in quotes is an error, as it is with OpenAI; extra fields are checked below
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    messages: Annotated[list[Any], Field(min_length=1, max_length=4096)]
    model: Annotated[str, Field(max_length=1000)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=10**9)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=_STOPS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_LIKELIEST)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if any(not text or len(text) > 1000 for text in texts):
            raise ValueError("each has 1 to 1000 characters")
        return stop

    def sampling(self, limits: Limits, stops: tuple[str, ...]) -> Sampling:
        """Return how the answers are written; `stops` are the template's own texts that end one.

        The default temperature is 0, as everywhere in llavakit, and not OpenAI's 1.
        """
        wanted = self.max_completion_tokens or self.max_tokens or limits.default_tokens
        own = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_new_tokens=min(wanted, limits.tokens or wanted),
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            # vLLM's clients write -1 for no limit, which is 0 here
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            seed=self.seed,
            stop=tuple(dict.fromkeys((*own, *stops))),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            n=self.n or 1,
        )


class HeatmapRequest(BaseModel):
    """A request for where an answer looked: the conversation that it ends."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    messages: Annotated[list[Any], Field(min_length=1, max_length=4096)]
    answer: Annotated[str, Field(min_length=1, max_length=20_000)]


def read_chat(body: bytes, limits: Limits) -> ChatRequest:
    """Return a request's body. Raises RequestError, which names the field that is wrong."""
    request = read_body(ChatRequest, body)
    for name, value in (request.model_extra or {}).items():
        if name in _PLAIN and value not in _PLAIN[name]:
            raise RequestError(
                400,
                f"`{name}` asks for what this server does not have; leave it out",
                param=name,
                code="unsupported_parameter",
            )
        if name not in _PLAIN and name not in _IGNORED:
            raise _unknown(name)
    if (request.n or 1) > limits.choices:
        raise RequestError(400, f"`n` is at most {limits.choices} here", param="n")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError(400, "`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise RequestError(
            400, "`stream_options` is only for `stream: true`", param="stream_options"
        )
    if request.stream_options is not None:
        more = request.stream_options.model_extra or {}
        _check_fields(more, {"include_obfuscation"}, "stream_options")
    return request


def check_messages(messages: list[Any]) -> None:
    """Raise RequestError for a field of a message that the server does not know.

    What is no message or part at all, the reader of messages refuses.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        where, content = f"messages[{number}]", message.get("content")
        _check_fields(message, _MESSAGE, where)
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict):
                _check_part(part, f"{where}.content[{place}]")


def _check_part(part: dict[str, Any], where: str) -> None:
    kind = part.get("type")
    if kind == "text":
        _check_fields(part, {*_PART, "text"}, where)
    elif kind in _PICTURES:
        # a second picture in one part would not be looked at
        named = [name for name in part if name in _NAMED and part[name] is not None][:1]
        _check_fields(part, {*_PART, *named}, where)
        for name in named:
            if isinstance(part[name], dict):
                _check_fields(part[name], {"url", "detail"}, f"{where}.{name}")


def _check_fields(table: dict[str, Any], known: set[str], where: str) -> None:
    """Raise RequestError for a field that is not known and says something."""
    for name, value in table.items():
        if name not in known and value not in _NOTHING:
            raise _unknown(f"{where}.{name}")


def _unknown(name: str) -> RequestError:
    return RequestError(
        400,
        f"Unrecognized request argument supplied: {name:.100}",
        param=f"{name:.100}",
        code="unknown_parameter",
    )


def read_body(kind: type[Body], body: bytes) -> Body:
    """Return a JSON body as a model of pydantic. Raises RequestError for what is none."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in found["loc"][:4]) or None
        if where and where.startswith("stop."):  # pydantic names the kind that it tried, too
            where = "stop"
        reason = found["msg"].removeprefix("Value error, ")
        if found["type"] == "json_invalid":
            raise RequestError(400, f"the body is not valid JSON: {reason}") from None
        named = f"`{where:.200}`: " if where else ""
        raise RequestError(
            400, f"{named}{reason}", param=where and where[:200], code="invalid_value"
        ) from None
