"""Takes steps that were finished elsewhere: the same record, and files that are what they were.

A step that is done lists what it left, each file with its hash, so that a file somebody changed
since is found. Files are linked rather than copied where the disk allows it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llavakit.recipe.files import fingerprint, new_folder

STEP_DONE = "artifact.json"  # written last: it says that the step finished

Contents = Mapping[str, str]
Record = Mapping[str, Any]
Finder = Callable[[str, Record, Path], tuple[Path | None, list[str]]]
"""A step's name, its record and the run's folder: where it is finished elsewhere, or why not."""


def step_contents(folder: Path) -> Contents:
    """Return what lies in a step's folder: the hash of each file, of a large one of samples."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != STEP_DONE]
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}


def record_changes(before: object, now: object, key: str = "") -> list[str]:
    """Return what differs in tables and lists, as recipes call it: `steps.finetune.epochs`."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        uses = [item.get("use") if isinstance(item, dict) else None for item in now]
        names = [use if uses.count(use) == 1 else str(at) for at, use in enumerate(uses, start=1)]
        before, now = (dict(zip(names, items, strict=True)) for items in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        paths = [(name, f"{key}.{name}" if key else str(name)) for name in {**before, **now}]
        pairs = ((before.get(name), now.get(name), path) for name, path in paths)
        return [found for pair in pairs for found in record_changes(*pair)]
    return [] if before == now else [key or "its record"]


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
