"""How the next token of an answer is chosen. Imports no torch: exported models use it, too."""

from __future__ import annotations

from dataclasses import dataclass

from llavakit.contracts.errors import ModelError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """None draws from entropy; only used where `temperature` is above 0."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and do not belong to it."""

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ModelError("an empty text cannot stop an answer; leave it out of `stop`")
        warm = 0 <= self.temperature < float("inf")
        if self.max_new_tokens < 1 or not warm or not 0 < self.top_p <= 1:
            raise ModelError(
                f"cannot sample with max_new_tokens={self.max_new_tokens}, "
                f"temperature={self.temperature}, top_p={self.top_p}; use at least one new "
                "token, a temperature of 0 or more, and 0 < top_p <= 1"
            )
