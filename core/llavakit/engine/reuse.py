"""Takes steps that another run finished: the same record, and files that still are what they were.

A step that is done lists what it left, each file with its hash, so that a file somebody changed
since is found. Files are linked rather than copied where the disk allows it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llavakit.contracts.errors import and_more
from llavakit.files import fingerprint, new_folder, peek_json

DONE = "artifact.json"  # written last: it says that the step finished

Contents = Mapping[str, str | int]


def contents(folder: Path) -> Contents:
    """Return what lies in a step's folder: the hash of each file, of a very large one its size."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != DONE)
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}


def find_step(
    name: str, record: Mapping[str, Any], runs: Sequence[Path]
) -> tuple[Path | None, list[str]]:
    """Return the folder of the same step, finished by one of the runs, and why others will not do.

    The same is what has the same model, seed, steps up to it and input files, was made by this
    version of llavakit, and has not been changed since.
    """
    problems = []
    for run in runs:
        folder = run / name
        done = peek_json(folder / DONE)
        known = done.get("contents")
        if not done:
            continue
        if done.get("record") != record:
            others = changes(done.get("record"), record)
            problems.append(f"{folder} differs in {and_more(others)}")
        elif (made_by := _version(run)) != version("llavakit"):  # it may do it otherwise
            problems.append(f"{folder} was made by llavakit {made_by}")
        elif not isinstance(known, dict):
            problems.append(f"{folder} does not list its files")
        elif changed := _changed(known, contents(folder)):
            problems.append(f"{folder} was changed since: {and_more(changed)}")
        else:
            return folder, problems
    return None, problems or ([f"{and_more(runs)} did not finish it"] if runs else [])


def changes(before: object, now: object, key: str = "") -> list[str]:
    """Return what differs in tables and lists, as recipes call it: `steps.finetune.epochs`."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        uses = [item.get("use") if isinstance(item, dict) else None for item in now]
        names = [use if uses.count(use) == 1 else str(at) for at, use in enumerate(uses, start=1)]
        before, now = (dict(zip(names, items, strict=True)) for items in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        paths = [(name, f"{key}.{name}" if key else str(name)) for name in {**before, **now}]
        pairs = ((before.get(name), now.get(name), path) for name, path in paths)
        return [found for pair in pairs for found in changes(*pair)]
    return [] if before == now else [key or "its record"]


def _changed(known: Contents, found: Contents) -> list[str]:
    return sorted(file for file in known if known[file] != found.get(file))


def _version(run: Path) -> str:
    packages = peek_json(run / "environment.json").get("packages")
    return str(packages.get("llavakit")) if isinstance(packages, dict) else "unknown"


def take_step(source: Path, target: Path) -> None:
    """Make `target` the same as `source`, whole or not at all."""
    with new_folder(target) as partial:
        shutil.copytree(source, partial, True, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    """Link a file: a finished step is never written to again. Copy it to another disk."""
    with suppress(OSError):
        os.link(source, target, follow_symlinks=False)
        return
    shutil.copy2(source, target, follow_symlinks=False)
