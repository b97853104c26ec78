"""Reads a run's folder, for reports and comparisons."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ValidationError, field_validator

from llavakit.contracts.errors import RecipeError
from llavakit.contracts.sections import Section

RECORD = "artifact.json"
"""The file that a finished step leaves in its folder."""
_HALF = re.compile(r"(?<!\\)((?:\\\\)*)\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
"""Half a character, which older records may hold: a whole one is written as it is."""


@dataclass(frozen=True)
class RunFolder:
    """A run as its recipe.toml tells it."""

    name: str
    seed: int
    steps: Mapping[str, Mapping[str, Any]]
    """What was chosen for each step that is not skipped, in order, by the name of its folder."""
    recipe: Mapping[str, Any]


def _number(value: object) -> object:
    """Return NaN for JSON's null: what is not finite is written so."""
    return math.nan if value in (None, math.inf, -math.inf) else value


Number = Annotated[float, BeforeValidator(_number)]


class StepRecord(BaseModel):
    """What a finished step said."""

    name: str
    folder: Path
    seconds: float
    metrics: dict[str, float]
    sections: list[Section]


def read_run(folder: Path) -> RunFolder:
    """Return what recipe.toml says. Raises RecipeError where there is none, or it is damaged."""
    path = folder / "recipe.toml"
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        steps = {
            # the number counts skipped steps, too:
            # a step keeps its folder when one before it is skipped
            f"{number:02}-{step['use']}": step
            for number, step in enumerate(recipe["steps"], start=1)
            if not step.get("skip")
        }
        return RunFolder(str(recipe["name"]), int(recipe.get("seed", 0)), steps, recipe)
    except OSError as error:
        raise RecipeError(
            f"{folder} is no run: cannot read recipe.toml ({error.strerror})"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path} is damaged: {error}") from error


def read_record(folder: Path) -> StepRecord:
    """Return what the finished step in `folder` said. Raises RecipeError where it is damaged."""
    path = folder / RECORD
    try:
        said = _HALF.sub(r"\1\\ufffd", path.read_text(encoding="utf-8"))
        return _Stored.model_validate_json(said).record(folder)
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is damaged ({error}); run its recipe again") from error


class _Stored(BaseModel):
    seconds: float = 0.0
    metrics: dict[str, Number]
    sections: list[Section] = []

    @field_validator("sections", mode="before")
    @classmethod
    def _with_numbers(cls, sections: Any) -> Any:
        """Return them with numbers where curves have null."""
        with suppress(AttributeError, TypeError):  # of another form: what reads them says it
            for section in sections:
                for points in section.get("series", {}).values():
                    points[:] = [[_number(number) for number in point] for point in points]
        return sections

    def record(self, folder: Path) -> StepRecord:
        return StepRecord(name=folder.name, folder=folder, **dict(self))
