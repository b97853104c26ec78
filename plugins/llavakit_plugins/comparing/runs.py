"""Reads the folders of runs and groups the runs of one recipe with different seeds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit import Published
from llavakit.contracts.errors import RecipeError
from llavakit_plugins.reporting.run_folder import RECORD, read_record, read_run
from llavakit_plugins.reporting.summary import flat
from llavakit_plugins.reporting.values import show

_SAME_EXPERIMENT = ("name", "seed", "device", "machine", "trackers", "paper")
"""Keys of a recipe that may differ within one experiment."""
_SHOWN = 3  # of the keys in which two recipes of one name differ


@dataclass(frozen=True)
class FinishedRun:
    """A run that did all its steps."""

    folder: Path
    name: str
    seed: int
    metrics: Mapping[str, float]
    """By `step.metric`, in the order of the steps."""
    experiment: Mapping[str, Any]
    """The recipe's keys that make it this experiment, flat."""
    published: tuple[Published, ...]


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in their seed."""

    name: str
    runs: Sequence[FinishedRun]

    def values(self, metric: str) -> list[float]:
        """Return the metric of each run that has it."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def published(self, metric: str) -> Published | None:
        """Return the paper's figure beside a metric, where the recipe names one."""
        found = (item for item in self.runs[0].published if item.metric == metric)
        return next(found, None)


def read_runs(folders: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """Return the finished runs, and a sentence on each folder that is none."""
    runs, problems = [], []
    for folder in dict.fromkeys(folders):  # a shell may name one folder twice
        try:
            runs.append(_read_run(folder))
        except RecipeError as error:
            problems.append(str(error))
    return runs, problems


def _read_run(folder: Path) -> FinishedRun:
    run = read_run(folder)
    try:
        published = tuple(Published.model_validate(item) for item in run.recipe.get("paper", ()))
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{folder / 'recipe.toml'} is damaged: {error}") from error
    missing = [step for step in run.steps if not (folder / step / RECORD).is_file()]
    if missing:
        raise RecipeError(f"{folder} is unfinished: {missing[0]} is not done")
    # a step that is there twice is told apart by its number
    uses = Counter(str(choice["use"]) for choice in run.steps.values())
    metrics: dict[str, float] = {}
    for step, choice in run.steps.items():
        label = str(choice["use"]) if uses[str(choice["use"])] == 1 else step
        found = read_record(folder / step).metrics
        metrics |= {f"{label}.{key}": value for key, value in found.items()}
    experiment = flat({k: v for k, v in run.recipe.items() if k not in _SAME_EXPERIMENT})
    return FinishedRun(folder, run.name, run.seed, metrics, experiment, published)


def group_runs(runs: Sequence[FinishedRun]) -> tuple[list[Group], list[str]]:
    """Return the runs by recipe, in the order they came, and a sentence on each that is left out.

    Recipes of one name that differ in anything but the seed are kept apart, and named by what
    differs. Of two runs with one seed, the second adds nothing.
    """
    together: dict[str, list[FinishedRun]] = {}
    problems = []
    for run in runs:
        # tables have no hash
        key = json.dumps([run.name, run.experiment], sort_keys=True, default=str)
        same = together.setdefault(key, [])
        # the same numbers again would make an error look smaller
        twin = next((other for other in same if other.seed == run.seed), None)
        if twin is None:
            same.append(run)
        else:
            problems.append(f"{run.folder} repeats {twin.folder}: the same recipe and seed")
    first: dict[str, FinishedRun] = {}
    groups = []
    for same in together.values():
        run = same[0]
        usual = first.setdefault(run.name, run)
        name = run.name if usual is run else f"{run.name} ({_difference(usual, run)})"
        groups.append(Group(name, same))
    return groups, problems


def _difference(usual: FinishedRun, other: FinishedRun) -> str:
    absent = object()  # None may be an option's value
    keys = [
        key
        for key in dict.fromkeys([*other.experiment, *usual.experiment])
        if other.experiment.get(key, absent) != usual.experiment.get(key, absent)
    ]
    told = [f"{key}={show(other.experiment.get(key))}" for key in keys[:_SHOWN]]
    return ", ".join([*told, *(["…"] if len(keys) > _SHOWN else [])])
