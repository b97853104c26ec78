"""Which steps of a run read which tokenised data; what none of them reads any more is removed.

    runs/NAME/tokenised/steps.json      by a step's name, the keys of what it reads

The main process alone calls this: a run's folder has one at a time. A file that no step has noted,
of an earlier version, stays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from llavakit import Run, write_text

_TABLE = "steps.json"


def note_read(run: Run, file: Path) -> None:
    """Note, before it is made, that a step reads a file of tokenised data."""
    table = _read(file.parent / _TABLE)
    keys = table.setdefault(run.directory.name, [])
    if file.stem not in keys:
        keys.append(file.stem)
        _write(file.parent / _TABLE, table)


def remove_unread(run: Run, files: Iterable[Path]) -> None:
    """Remove what this step read in earlier attempts, beside these files, and no other step reads.

    What is read by a step that the run's plan no longer has goes, too. The table is written last,
    so that a kill leaves what the next attempt removes.
    """
    own = list(files)
    if not own:
        return
    folder = own[0].parent
    before = _read(folder / _TABLE)
    now = {**before, run.directory.name: [file.stem for file in own]}
    with suppress(OSError, ValueError, KeyError, TypeError):  # without a plan all steps stay
        planned = json.loads((run.directory.parent / "plan.json").read_text("utf-8"))["steps"]
        now = {step: keys for step, keys in now.items() if step in planned}
    read = {key for keys in now.values() for key in keys} | {file.stem for file in own}
    for key in {key for keys in before.values() for key in keys} - read:
        shutil.rmtree(folder / f"{key}.blocks", ignore_errors=True)
        with suppress(OSError):  # what is left is no reason to end a run
            (folder / f"{key}.safetensors").unlink()
    if now != before:
        _write(folder / _TABLE, now)


def _read(path: Path) -> dict[str, list[str]]:
    with suppress(OSError, ValueError):
        table = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(table, dict) and all(isinstance(keys, list) for keys in table.values()):
            # names of ours alone: what is read here is removed from the disk
            return {
                str(step): [key for key in keys if isinstance(key, str) and key.isalnum()]
                for step, keys in table.items()
            }
    return {}


def _write(path: Path, table: dict[str, list[str]]) -> None:
    write_text(path, json.dumps(table, indent=1))
