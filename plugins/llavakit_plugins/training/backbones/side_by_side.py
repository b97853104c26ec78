"""Trains several networks at the same time: the first in this process, each other one in a fork.

The steps of a small network gain little from more than one thread, and threads of one process wait
for each other's Python. A fork leaves its network where every training does: in its checkpoint.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from llavakit import Run, Stopped, TrainingError
from llavakit_plugins.training import heap
from llavakit_plugins.training.backbones.loop import Losses, Training, train
from llavakit_plugins.training.forks import (
    held_signals,
    how_ended,
    learn_in_fork,
    may_learn_in_forks,
    threads,
)

_LOOK = 0.2  # seconds between two looks at whether the user asked to stop


def optimise(run: Run, *trainings: Training) -> list[Losses]:
    """Train each network for its steps; return the losses of each, in the same order.

    On a CPU all are trained at the same time, each but the first by one thread, or, to the same
    bits, one after the other where a fork could not learn. Raises TrainingError if a loss or a
    gradient is not finite, and Stopped, after saving, if the user asked to stop.
    """
    shown = _Shown(run, trainings)
    runs = [replace(run, progress=partial(shown, number)) for number in range(len(trainings))]
    pairs = list(zip(runs, trainings, strict=True))
    devices = {p.device.type for each in trainings for p in each.updates.named.values()}
    if devices != {"cpu"}:
        return [train(mine, each) for mine, each in pairs]
    heap.settle()
    beside = max(1, torch.get_num_threads() - len(pairs[1:]))
    if not may_learn_in_forks():
        losses = []
        for number, (mine, each) in enumerate(pairs):
            with threads(1 if number else beside):
                losses.append(train(mine, each))
        return losses
    with threads(beside), _forked(pairs[1:]) as forks:

        def stopping() -> bool:
            forks.hear()
            return bool(forks.failures) or run.stopping()

        losses = [train(replace(runs[0], stopping=stopping), trainings[0])]
        while forks.hear(_LOOK):
            if stopping():
                raise Stopped
    # what was trained elsewhere is taken from the last checkpoint
    return losses + [train(replace(mine, resume=True), each) for mine, each in pairs[1:]]


class _Shown:
    """Shows the progress of several trainings as that of one."""

    def __init__(self, run: Run, trainings: Sequence[Training]) -> None:
        self._run = run
        self._done = [0] * len(trainings)
        self._notes = [""] * len(trainings)
        self._total = sum(training.steps for training in trainings)

    def __call__(self, number: int, done: int, total: int, note: str = "") -> None:
        self._done[number], self._notes[number] = done, note
        self._run.progress(sum(self._done), self._total, ", ".join(filter(None, self._notes)))


class _Fork(NamedTuple):
    name: str
    run: Run
    process: Any


class _Forks:
    """The forks, as the process sees them that forked them."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self._context = multiprocessing.get_context("fork")
        self._stop = self._context.Event()
        self._of_pipe: dict[Any, _Fork] = {}

    def begin(self, run: Run, training: Training) -> None:
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work, args=(run, training, there, self._stop), daemon=True
        )
        try:
            process.start()
        except OSError as error:
            raise TrainingError(
                f"no process could be begun to train {training.name} in ({error}); close other "
                "programs"
            ) from error
        there.close()  # the end of the pipe says that of the process
        self._of_pipe[here] = _Fork(training.name, run, process)

    def hear(self, seconds: float | None = 0.0) -> bool:
        """Pass on what the forks have said, after waiting so long for a word of them; return
        whether there are some left."""
        # without a fork nobody would say a word, and the whole time would be waited for
        ready: list[Any] = wait(list(self._of_pipe), seconds) if self._of_pipe else []
        for pipe in ready:
            fork = self._of_pipe[pipe]
            try:
                while pipe.poll():
                    said = pipe.recv()
                    if isinstance(said, Exception):
                        self.failures.append(said)
                    else:
                        told, values, named = said
                        getattr(fork.run, told)(*values, **named)
            except (EOFError, OSError):
                self._ended(fork)
                del self._of_pipe[pipe]
        return bool(self._of_pipe)

    def end(self) -> None:
        """Ask all to save and stop, and wait for it."""
        self._stop.set()
        while self._of_pipe:
            self.hear(None)

    def _ended(self, fork: _Fork) -> None:
        fork.process.join()
        if fork.process.exitcode:
            self.failures.append(
                TrainingError(
                    f"the process that trained {fork.name} {how_ended(fork.process.exitcode)}; "
                    "close other programs, and go on with --resume"
                )
            )


@contextmanager
def _forked(pairs: Sequence[tuple[Run, Training]]) -> Iterator[_Forks]:
    """Yield forks at work; in the end they are done, or stopped. Raises what one failed of."""
    forks = _Forks()
    stopped: list[Exception] = []
    try:
        with held_signals():
            for run, training in pairs:
                forks.begin(run, training)
        yield forks
    except Stopped as asked:
        stopped.append(asked)
    finally:
        forks.end()
    # those that were only stopped by one that failed say less than it does
    for error in sorted(forks.failures + stopped, key=lambda error: isinstance(error, Stopped)):
        raise error


def _work(run: Run, training: Training, pipe: Connection, stop: Any) -> None:
    """Train in this process, which was forked for it."""

    def progress(done: int, total: int, note: str = "") -> None:
        pipe.send(("progress", (done, total, note), {}))

    def event(name: str, /, **values: Any) -> None:
        pipe.send(("event", (name,), values))

    own = replace(run, progress=progress, event=event, stopping=stop.is_set)
    learn_in_fork(pipe, partial(train, own, training))
