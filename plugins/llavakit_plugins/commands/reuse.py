"""Finds steps that another run finished the same way, for `llava-run RECIPE --reuse DIR`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llavakit import (
    STEP_DONE,
    Finder,
    RecipeError,
    and_more,
    peek_json,
    record_changes,
    step_contents,
)


def runs_below(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders among these folders and directly below them.

    Raises RecipeError for a folder that neither is a run nor holds any.
    """
    found: list[Path] = []
    for folder in folders:
        below = sorted(folder.iterdir()) if folder.is_dir() else []
        runs = [path for path in (folder, *below) if (path / "recipe.toml").is_file()]
        if not runs:
            raise RecipeError(
                f"{folder} holds no run to take finished steps from; name a run's folder, or the "
                "folder that runs are in"
            )
        found += runs
    return found


def finished_in(runs: Sequence[Path]) -> Finder:
    """Return what finds a step in these runs, the one that asks left out."""

    def find(
        name: str, record: Mapping[str, Any], directory: Path
    ) -> tuple[Path | None, list[str]]:
        others = [run for run in runs if run.resolve() != directory.resolve()]
        return _find_step(name, record, others)

    return find


def _find_step(
    name: str, record: Mapping[str, Any], runs: Sequence[Path]
) -> tuple[Path | None, list[str]]:
    """Return the folder of the same step, finished by one of the runs, and why others will not do.

    The same is what has the same model, seed, steps up to it and input files, was made by this
    version of llavakit, and has not been changed since.
    """
    problems = []
    for run in runs:
        folder = run / name
        done = peek_json(folder / STEP_DONE)
        known = done.get("contents")
        if not done:
            continue
        if done.get("record") != record:
            others = record_changes(done.get("record"), record)
            problems.append(f"{folder} differs in {and_more(others)}")
        elif (made_by := _version(run)) != version("llavakit"):  # it may do it otherwise
            problems.append(f"{folder} was made by llavakit {made_by}")
        elif not isinstance(known, dict):
            problems.append(f"{folder} does not list its files")
        elif changed := _changed(known, step_contents(folder)):
            problems.append(f"{folder} was changed since: {and_more(changed)}")
        else:
            return folder, problems
    return None, problems or ([f"{and_more(runs)} did not finish it"] if runs else [])


def _changed(known: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return sorted(file for file in known if known[file] != found.get(file))


def _version(run: Path) -> str:
    packages = peek_json(run / "environment.json").get("packages")
    return str(packages.get("llavakit")) if isinstance(packages, dict) else "unknown"
