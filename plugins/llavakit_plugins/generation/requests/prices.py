"""What tokens cost: a table with the day it was read off, which a recipe may overrule."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Price(BaseModel):
    """USD for a million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    batch: float = Field(default=0.5, ge=0, le=1)
    """Share of the price that the batch service takes."""

    def of(self, input_tokens: int, output_tokens: int, *, batch: bool = False) -> float:
        """Return what so many tokens cost, in USD."""
        whole = (input_tokens * self.input + output_tokens * self.output) / 1e6
        return whole * self.batch if batch else whole


@dataclass(frozen=True)
class PriceList:
    """The packaged prices."""

    date: str
    models: dict[str, Price]

    def find(self, model: str) -> Price | None:
        """Return the price of a model, or of the one that a dated name is a version of."""
        names = [name for name in self.models if _is_version(model, name)]
        return self.models[max(names, key=len)] if names else None


def _is_version(model: str, name: str) -> bool:
    """Say whether `model` is `name`, or `name-2024-08-06`, or `name-0314`."""
    rest = model.removeprefix(name)
    return model == name or (rest != model and rest.strip("-0123456789") == "" and rest[0] == "-")


@cache
def price_list() -> PriceList:
    """Return the prices that come with llavakit."""
    text = (
        files("llavakit_plugins.generation.requests")
        .joinpath("prices.toml")
        .read_text(encoding="utf-8")
    )
    table: dict[str, Any] = tomllib.loads(text)
    models = {name: Price(**price) for name, price in table["models"].items()}
    return PriceList(str(table["date"]), models)
