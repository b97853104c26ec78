"""Which steps of a run read which tokenised data: what changed since, and what none reads any more.

    runs/NAME/tokenised/steps.json      by a step's name, what it reads, and the stamps of its files

The main process alone calls this: a run's folder has one at a time. A file that no step has noted,
of an earlier version, stays.
"""

from __future__ import annotations

import filecmp
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from llavakit import Run, TrainingError, and_more, write_text

_TABLE = "steps.json"

_log = logging.getLogger("llavakit")


class _Reads(BaseModel):
    """What one step reads."""

    settled: list[str] = []
    """Keys of the newest attempt whose data is all there: what is trained on, what is held out."""
    stamps: dict[str, list[Any]] = Field(default_factory=dict)
    """By key, those too that are being made, or were not settled: see `stamps_of`."""


_Table = TypeAdapter(dict[str, _Reads])


def note_read(run: Run, file: Path, stamps: list[Any]) -> None:
    """Note, before it is made, that a step reads a file of tokenised data."""
    table = _read(file.parent)
    own = table.setdefault(run.directory.name, _Reads())
    if file.stem not in own.stamps:
        own.stamps[file.stem] = stamps
        _write(file.parent, table)


def settle(run: Run, files: Sequence[Path]) -> None:
    """Take these files as what a step reads, and remove what no step of the run reads any more.

    That is what the step read in earlier attempts and no other does, and what is read by steps that
    the run's plan no longer has. The table is written last, so that a kill leaves what the next
    attempt removes. Raises TrainingError, which names what changed, where the step goes on from a
    checkpoint and its data says something else than when that was written.
    """
    folder = files[0].parent
    before = _read(folder)
    own = before.get(run.directory.name, _Reads())
    if run.resume and any((run.directory / "checkpoints").glob("step-*")):
        for old, new in zip(own.settled, files, strict=False):
            _compare(run, folder / f"{old}.safetensors", new, own.stamps)
    keys = [file.stem for file in files]
    stamps = {key: own.stamps.get(key, []) for key in keys}
    now = {**before, run.directory.name: _Reads(settled=keys, stamps=stamps)}
    with suppress(OSError, ValueError, KeyError, TypeError):  # without a plan all steps stay
        planned = json.loads((run.directory.parent / "plan.json").read_text("utf-8"))["steps"]
        now = {step: reads for step, reads in now.items() if step in planned}
    read = {*keys, *(key for reads in now.values() for key in reads.stamps)}
    for key in {key for reads in before.values() for key in reads.stamps} - read:
        shutil.rmtree(folder / f"{key}.blocks", ignore_errors=True)
        with suppress(OSError):  # what is left is no reason to end a run
            (folder / f"{key}.safetensors").unlink()
    if now != before:
        _write(folder, now)


def _compare(run: Run, old: Path, new: Path, stamps: Mapping[str, Sequence[Any]]) -> None:
    """Raise TrainingError where what was made of data before is something else than now."""
    if old == new:
        return
    before, now = (stamps.get(file.stem, []) for file in (old, new))
    differing = [stamp for stamp in now if stamp not in before]
    differing += [stamp for stamp in before if stamp not in now]
    names = dict.fromkeys(stamp[0] for stamp in differing if isinstance(stamp, list) and stamp)
    what = and_more(names) if names else "how the data is read"
    if not old.exists():
        _log.warning(
            "note: %s: not what it was when %s began, by size, time or content, and what was made "
            "of it then is gone: if it says something else, run again without --resume",
            what, run.directory.name,
        )  # fmt: skip
    elif not filecmp.cmp(old, new, shallow=False):  # another time of a file alone changes nothing
        raise TrainingError(
            f"{what}: changed since {run.directory.name} began, and its checkpoints are of what "
            "was there before; put it back, or run without --resume, which starts this step over"
        )


def _read(folder: Path) -> dict[str, _Reads]:
    with suppress(OSError, ValueError, ValidationError):
        table = _Table.validate_json((folder / _TABLE).read_bytes())
        for reads in table.values():
            # names of ours alone: what is read here is removed from the disk
            reads.stamps = {key: found for key, found in reads.stamps.items() if key.isalnum()}
        return table
    return {}


def _write(folder: Path, table: dict[str, _Reads]) -> None:
    write_text(folder / _TABLE, _Table.dump_json(table).decode())
