"""The size of a data set that a plan assumes while its file does not exist yet."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

CHARACTERS_A_TOKEN = 4.2  #: Of English by LLaMA's, roughly: where there is no tokenizer.


class Expected(BaseModel):
    """The size of a data set that a recipe states."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    """Mean number of text tokens in a sample."""

    def upto(self, limit: int | None) -> tuple[int, int]:
        """Return (samples, mean text tokens) where only `limit` samples are used."""
        return self.samples if limit is None else min(self.samples, limit), self.tokens
