"""What a recipe says of a service that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import os
import re
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from llavakit import Options, hide, is_key, is_secret_name
from llavakit_plugins.generation.requests.prices import Price

OWN_URL = "https://api.openai.com/v1"


_PORTS = {"http": 80, "https": 443}
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+=-]{16,}")
"""What may be a key and is no usual name of a file."""


def _plain_url(url: str) -> str:
    """Return an address in the one form by which two are told to be the same.

    Raises ValueError where it is none, or holds more than an address.
    """
    found = re.fullmatch(r"(https?)://([^/?#\\]+)(/[^?#\\]*)?(.*)", url, re.IGNORECASE)
    if not found or not url.isprintable() or " " in url:
        raise ValueError("write it as https://HOST/v1, without spaces")
    scheme, authority, path, rest = found[1].lower(), found[2], found[3] or "", found[4]
    if "@" in authority + path or rest:
        raise ValueError(
            "it may hold no password, user or key, nor anything behind `?` or `#`; use `key_env` "
            "or `key_file`"
        )
    if any(map(is_key, path.split("/"))):
        raise ValueError("its path may hold no key; use `key_env` or `key_file`")
    # an IPv6 address has colons of its own, within brackets
    host, _, port = (
        authority.rpartition(":") if re.search(r":[^:\]]*$", authority) else (authority, "", "")
    )
    if not _is_host(host):
        raise ValueError("it names no host; write it as https://HOST/v1")
    if (authority != host and not re.fullmatch(r"0*[1-9][0-9]{0,4}", port)) or int(
        port or 0
    ) > 65535:
        raise ValueError(f"`{port}` is no port; write it as https://HOST:8000/v1, or leave it out")
    at = f":{int(port)}" if port and int(port) != _PORTS[scheme] else ""
    return f"{scheme}://{host.lower()}{at}{path.rstrip('/')}"


def _is_host(host: str) -> bool:
    try:
        if host.startswith("["):
            return host.endswith("]") and bool(IPv6Address(host[1:-1]))
        return re.fullmatch(r"[\w.-]+", host.encode("idna").decode()) is not None
    except ValueError:
        return False


def _no_key_itself(path: Path | None) -> Path | None:
    text = "" if path is None else str(path)
    if (is_key(text) or _RANDOM.fullmatch(text)) and not os.path.isfile(text):
        hide(text)
        raise ValueError("it names a file that holds the key; this looks like a key itself")
    return path


def _sound_fields(extra: dict[str, Any]) -> dict[str, Any]:
    """Refuse what no request can hold, and keys: they would be written down with the recipe."""
    _refuse_keys(extra)
    for name in ("messages", "stream"):
        if extra.get(name):
            raise ValueError(f"`{name}` is not for recipes to set; take it out")
    try:
        json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"it holds something that JSON cannot ({error})") from None
    return extra


def _refuse_keys(value: object) -> None:
    if isinstance(value, list):
        for item in value:
            _refuse_keys(item)
    for name, item in value.items() if isinstance(value, dict) else ():
        if is_secret_name(name) or (isinstance(item, str) and is_key(item)):
            hide(str(item))
            raise ValueError(f"`{name}` may hold no key; use `key_env` or `key_file`")
        _refuse_keys(item)


class OpenAIOptions(Options):
    model: str = Field(min_length=1)
    base_url: Annotated[str, AfterValidator(_plain_url)] = OWN_URL
    """Where the service is; http://localhost:11434/v1 is Ollama, for example."""
    key_env: str = Field(default="OPENAI_API_KEY", pattern=r"^[A-Z_][A-Z0-9_]*$")
    """The environment variable that holds the key."""
    key_file: Annotated[Path | None, AfterValidator(_no_key_itself)] = None
    """A file that holds the key, instead."""
    keyless: bool = False
    """Whether the service wants no key."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    max_tokens: int = Field(default=1024, ge=1)
    """Longest reply."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] | None = None
    """What the service calls `max_tokens`. None: as OpenAI does at its address, else the old name;
    where that is refused, the other."""
    extra: Annotated[dict[str, Any], AfterValidator(_sound_fields)] = Field(default_factory=dict)
    """More fields of the request's body, as the service defines them; "null" leaves one out."""
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
    detail: Literal["low", "high", "auto"] | None = None
    """How closely the service is to look at images; None leaves it to the service."""
    image_edge: int = Field(default=2048, ge=16)
    """Longest side of an image in pixels, as it is sent; larger ones are made smaller."""
    image_bytes: int = Field(default=8_000_000, ge=1000)
    """Largest file of an image, as it is sent; what is larger is encoded again as JPEG."""
    image_tokens: int | None = Field(default=None, ge=0)
    """What one image counts as in a price, where no formula of the model is known."""
    price: Price | None = None
    """USD for a million tokens, where the packaged list is wrong or has none."""
    batch: bool = False
    """Whether to use the batch service: half the price, within a day."""
    batch_size: int = Field(default=50_000, ge=1)
    """Most requests in one batch; OpenAI takes 50,000."""
    batch_bytes: int = Field(default=200_000_000, ge=1000)
    """Largest file of a batch; OpenAI takes 200 MB."""
    batches_at_once: int | None = Field(default=None, ge=1)
    """Most batches on their way; for accounts whose waiting tokens are limited."""
    poll_seconds: float = Field(default=60.0, gt=0)
