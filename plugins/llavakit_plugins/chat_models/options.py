"""What a recipe says of a service that speaks OpenAI's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from llavakit import Options
from llavakit_plugins.generation.requests.prices import Price

OWN_URL = "https://api.openai.com/v1"


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
