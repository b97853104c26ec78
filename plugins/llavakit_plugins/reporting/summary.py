"""Collects the content of a report: the run's folder, the steps' records, the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit import duration, peek_json, redacted
from llavakit.contracts.errors import RecipeError
from llavakit.contracts.sections import Section
from llavakit_plugins.reporting.run_folder import RunFolder, StepRecord, read_run


@dataclass(frozen=True)
class Part:
    """A part of the model."""

    name: str
    use: str
    parameters: int | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A step, done or not."""

    name: str
    anchor: str
    seconds: float | None = None
    """None: not yet run."""
    share: float = 0.0
    """Of the longest step's time, in percent."""
    folder: Path = Path()
    options: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    name: str
    facts: Sequence[str]
    stages: Sequence[Stage]
    parts: Sequence[Part]
    environment: Mapping[str, Any]
    recipe: str


def collect(directory: Path, records: Sequence[StepRecord]) -> Report:
    """Return what there is to show of the steps that are done and of those that are not."""
    try:
        run = read_run(directory)
    except RecipeError:  # the report shows what else there is
        run = RunFolder(directory.resolve().name, 0, {}, {})
    longest = max((record.seconds for record in records), default=0.0) or 1.0
    stages = [
        Stage(
            name=record.name,
            anchor=f"step-{number}",
            seconds=record.seconds,
            share=100 * record.seconds / longest,
            folder=record.folder,
            options=_options(run.steps.get(record.name, {})),
            metrics=record.metrics,
            sections=record.sections,
        )
        for number, record in enumerate(records, start=1)
    ]
    done = {record.name for record in records}
    stages += [Stage(name, "") for name in run.steps if name not in done]

    environment = peek_json(directory / "environment.json")
    plan = flat(peek_json(directory / "plan.json"))
    parts = [
        Part(name, str(choice.get("use")), plan.get(f"parts.{name}.parameters"), _options(choice))
        for name, choice in run.recipe.get("model", {}).items()
    ]
    device = environment.get("device_name", environment.get("device"))
    facts = [
        f"seed {run.seed}",
        *([str(device)] if device else []),
        f"{len(records)} of {len(stages)} steps done",
        duration(sum(record.seconds for record in records)),
    ]
    try:
        text = (directory / "recipe.toml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return Report(run.name, facts, stages, parts, flat(environment), text.strip())


def _options(choice: Mapping[str, Any]) -> dict[str, Any]:
    stated = {key: value for key, value in choice.items() if key not in ("use", "skip")}
    # keys and passwords are taken out again here, as the report is what people send to others
    return flat(redacted(stated))


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        items = dict(enumerate(value, 1)) if _holds_tables(value) else value
        if isinstance(items, Mapping):
            found |= flat({str(k): v for k, v in items.items()}, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _holds_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)
