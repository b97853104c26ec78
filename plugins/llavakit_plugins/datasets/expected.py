"""What a plan reckons with while a data file is not there."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Expected(BaseModel):
    """The size of a data set that a recipe states."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    """Mean text tokens a sample."""

    def upto(self, limit: int | None) -> tuple[int, int]:
        """Return (samples, mean text tokens) where only `limit` samples are used."""
        return self.samples if limit is None else min(self.samples, limit), self.tokens
