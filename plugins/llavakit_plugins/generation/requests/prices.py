"""The prices of tokens: a packaged table with its date, which a recipe can override."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Price(BaseModel):
    """Prices in USD per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    batch: float = Field(default=0.5, ge=0, le=1)
    """Share of the price, 0 to 1, that the batch service charges."""

    def of(self, input_tokens: int, output_tokens: int, *, batch: bool = False) -> float:
        """Return the price of so many tokens in USD."""
        whole = (input_tokens * self.input + output_tokens * self.output) / 1e6
        return whole * self.batch if batch else whole


@dataclass(frozen=True)
class PriceList:
    """The packaged prices, by model."""

    date: str
    """The day on which the prices were looked up."""
    models: dict[str, Price]

    def find(self, model: str) -> Price | None:
        """Return the price of a model, also under a dated name of one; None if it is unknown."""
        name = find_version(self.models, model)
        return None if name is None else self.models[name]


def find_version(names: Iterable[str], model: str) -> str | None:
    """Return the name among `names` that a model has, or that it is a dated version of."""
    # the longest, as `gpt-4o-mini` begins with `gpt-4o`
    return max((name for name in names if _is_version(model, name)), key=len, default=None)


def _is_version(model: str, name: str) -> bool:
    """Return whether `model` is `name`, or a dated version such as `name-2024-08-06`."""
    rest = model.removeprefix(name)
    return model == name or (rest != model and rest.strip("-0123456789") == "" and rest[0] == "-")


@cache
def price_list() -> PriceList:
    """Return the price list that comes with llavakit."""
    text = (
        files("llavakit_plugins.generation.requests")
        .joinpath("prices.toml")
        .read_text(encoding="utf-8")
    )
    table: dict[str, Any] = tomllib.loads(text)
    models = {name: Price(**price) for name, price in table["models"].items()}
    return PriceList(str(table["date"]), models)
