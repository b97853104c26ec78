"""Data sets that are tokenised once for a run: by all processes, into a file that they all map.

    runs/NAME/tokenised/KEY.safetensors     one for each data set, template, tokenizer and length
    runs/NAME/tokenised/KEY.blocks/         what is done of one that is not whole yet

Each process takes every n-th block of samples and writes it when it is whole, so a kill loses no
more than the blocks at work. Where there are many samples, forks read them for it. The main process
joins the blocks. Later steps and runs of the same folder find the file by its key; see
`tokenised_steps` for when it is removed.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Literal

from llavakit import (
    Dataset,
    LlavaError,
    LlavaModel,
    PromptTemplate,
    Run,
    Sample,
    Stopped,
    TrainingError,
    Use,
    explain_write,
)
from llavakit.contracts.run import ProcessGroup
from llavakit_plugins.datasets.columns import Columns, Stored, write_columns
from llavakit_plugins.training.agreement import in_each, in_main, raise_first
from llavakit_plugins.training.corpus import Corpus, reading
from llavakit_plugins.training.corpus_key import key_of, stamps_of
from llavakit_plugins.training.rows import Reading, blocks_of, check
from llavakit_plugins.training.tokenised_steps import note_read
from llavakit_plugins.training.workers import processes_for, read_blocks

FOLDER = "tokenised"
_PATIENCE = 60.0  # seconds until a shared file system shows on one machine what another wrote

_log = logging.getLogger("llavakit")


def corpus_of(
    run: Run,
    use: Use[Dataset],
    model: LlavaModel,
    template: PromptTemplate,
    max_length: int,
    *,
    unlearned: Literal["refuse", "skip"] = "refuse",
    note: str = "tokenising",
    together: int = 1,
    workers: int | None = None,
) -> tuple[Corpus, list[str]]:
    """Return a data set as training reads it, and what a reader of the run should know of it.

    All of `run.process_group` must call it; for each of them at most `workers` processes read.
    Where it was tokenised before, the data set is not even built. Raises as `Corpus` does, in every
    process; Stopped where that is asked for; and TrainingError where the processes do not see the
    same folder, or where one of them is killed.
    """
    group = run.process_group
    data: Dataset | None = None

    def find() -> Path:
        nonlocal data
        folder = run.directory.parent / FOLDER
        stamps = stamps_of(run, use)
        key = key_of(run, use, model, template, max_length, stamps)
        path = folder / f"{key}.safetensors"
        with explain_write(folder):
            folder.mkdir(parents=True, exist_ok=True)
        note_read(run, path, stamps)
        if _opened(path) is None:
            data = run.build(use)
            reading(data, model, template, max_length)  # for its error
            with explain_write(folder):
                path.with_suffix(".blocks").mkdir(exist_ok=True)
        return path

    found = in_main(group, find)
    path, absent = group.broadcast((found or Path(), data is not None))
    if absent:
        sent = _sent(group, data)

        def read() -> Reading:
            nonlocal data
            data = run.build(use) if sent is None else sent
            return reading(data, model, template, max_length)

        made = in_each(group, read)
        _tokenise(run, made, path, note, processes_for(group, workers))
    columns = _opened(path) if _appears(path) else None
    if group.any(columns is None):
        raise _unseen(path)
    assert columns is not None
    # most data is never asked again: then it need not stay in memory, nor be built
    later = Later(lambda: run.build(use)) if (columns.facts["paths"] or data is None) else data
    corpus = Corpus(
        later, model, template, max_length, unlearned=unlearned, columns=columns, together=together
    )
    return corpus, list(columns.facts["notes"])


class Later(Dataset):
    """A data set that is built when it is first asked for something."""

    def __init__(self, build: Callable[[], Dataset]) -> None:
        self._build = build

    @cached_property
    def _built(self) -> Dataset:
        return self._build()

    def __len__(self) -> int:
        return len(self._built)

    def __getitem__(self, index: int) -> Sample:
        return self._built[index]

    def __reduce__(self) -> tuple[Callable[[Dataset], Dataset], tuple[Dataset]]:
        return _same, (self._built,)  # what builds it has no name that another process knows


def _same(data: Dataset) -> Dataset:
    return data


def _tokenise(run: Run, made: Reading, path: Path, note: str, processes: int) -> None:
    """Write what is not written yet of a data set's blocks, and join them to `path`."""
    group, folder = run.process_group, path.with_suffix(".blocks")
    if group.any(not _appears(folder)):
        raise _unseen(folder)
    total = len(made.data)
    blocks = blocks_of(total)
    files = [folder / f"{number:06}.safetensors" for number in range(len(blocks))]
    mine = range(group.rank, len(blocks), group.size)
    left = [number for number in mine if not _is_whole(files[number], len(blocks[number]))]
    written = sum(len(blocks[number]) for number in mine) - sum(len(blocks[n]) for n in left)

    def shows(done: int) -> None:
        run.progress(min((written + done) * group.size, total), total, note)

    with closing(read_blocks(made, [blocks[number] for number in left], processes, shows)) as read:
        for first in range(0, len(blocks), group.size):
            problem = None
            if left and left[0] == first + group.rank:
                try:
                    columns = next(read)
                    write_columns(files[left.pop(0)], [columns], columns.facts)
                except LlavaError as error:
                    problem = error
            raise_first(group, problem)
            if run.stopping():
                raise Stopped

    def join() -> None:
        if not all(map(_appears, files)):
            raise _unseen(folder)
        write_columns(path, Stored(files), made.facts(Stored(files)))
        shutil.rmtree(folder, ignore_errors=True)

    in_main(group, join)


def _is_whole(file: Path, samples: int) -> bool:
    """Say whether an attempt that was interrupted wrote a block of so many samples."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        before = Columns.open(file)
        check(before)
        return bool(before.facts["samples"] == samples)
    return False


def _sent(group: ProcessGroup, data: Dataset | None) -> Dataset | None:
    """Return the main process's data set in every process: it was read and checked there.

    In others it is None where it cannot be sent: a plugin's may hold what cannot.
    """
    goes = False
    if data is not None and group.size > 1:
        with suppress(Exception):
            goes = bool(pickle.dumps(data))
    return group.broadcast(data) if group.broadcast(goes) else data


def _opened(path: Path) -> Columns | None:
    """Return what was tokenised before, or None; what is damaged is removed, and that is said."""
    try:
        columns = Columns.open(path)
        check(columns)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        _log.warning("note: %s is damaged (%s): its data is tokenised again", path, error)
        with suppress(OSError):
            path.unlink()
        return None
    return columns


def _appears(path: Path) -> bool:
    """Say whether a file or folder is there, soon: another machine may have written it just now."""
    until = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _unseen(path: Path) -> TrainingError:
    return TrainingError(
        f"not all processes see {path}: put the run's folder (--out) on a file system that all "
        "machines share"
    )
