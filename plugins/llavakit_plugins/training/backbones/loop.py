"""A bare training loop with checkpoints, for backbones: one after the other, or side by side."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llavakit import Run, Stopped, TrainingError
from llavakit_plugins.training.backbones.options import ContrastiveOptions, TextOptions
from llavakit_plugins.training.checkpoints import Checkpoints
from llavakit_plugins.training.kinds import Group
from llavakit_plugins.training.optimiser import Rates, Updates
from llavakit_plugins.training.schedules import Cosine, FallingOptions

_CHECKPOINT_EVERY = 200
_LOG_EVERY = 20

Losses = list[tuple[int, float]]
"""Steps, from 1, and their losses."""


@dataclass(frozen=True)
class Training:
    """A network to be trained."""

    name: str
    updates: Updates
    steps: int
    loss_of: Callable[[int], Tensor]
    """The loss of a step, from 0. It must depend on the step and the weights only: then a resumed
    run computes what an uninterrupted run computes."""
    end: Callable[[], object]
    """Called after the last step."""


@dataclass(frozen=True)
class _State:
    losses: Losses


def updates_of(network: nn.Module, options: ContrastiveOptions | TextOptions, run: Run) -> Updates:
    """Return the updates of all parameters of a network.

    Weight decay is for matrices only, as in CLIP: decayed norms and embeddings of rare tokens drift
    to zero.
    """
    named = dict(network.named_parameters())
    decayed = {name: p for name, p in named.items() if p.ndim > 1 and "embed" not in name}
    others = {name: p for name, p in named.items() if name not in decayed}
    groups = [Group(decayed, options.lr, options.weight_decay), Group(others, options.lr)]
    rates = Rates(Cosine(FallingOptions()), options.steps, options.warmup)
    return Updates(groups, rates, optimiser=run.build(options.optimiser))


def optimise(run: Run, *trainings: Training) -> list[Losses]:
    """Train each network for its steps; return the losses of each, in the same order.

    On a CPU all are trained at the same time, and share its threads: the steps of a small network
    gain little from more than one. On other devices they are trained one after the other. Saves a
    checkpoint of each every 200 steps. Raises TrainingError if a loss or a gradient is not finite,
    and Stopped, after saving, if the user asked to stop.
    """
    beside = _Beside(run, trainings)
    devices = {p.device.type for each in trainings for p in each.updates.named.values()}
    if devices != {"cpu"} or len(trainings) == 1:
        return [_train(beside.run(number), each) for number, each in enumerate(trainings)]
    with _shared_threads(len(trainings)) as share, ThreadPoolExecutor(len(trainings)) as pool:
        # OpenMP keeps the number of threads for each thread that starts some
        def train(number: int) -> Losses:
            torch.set_num_threads(share)
            return _train(beside.run(number), trainings[number])

        try:
            futures = [pool.submit(train, number) for number in range(len(trainings))]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # one has failed, or the user is impatient: the others save and stop as well
            beside.stopped.set()
    failures = [error for future in futures if (error := future.exception()) is not None]
    # the others were only stopped by the one that failed
    for error in sorted(failures, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [future.result() for future in futures]


@contextmanager
def _shared_threads(among: int) -> Iterator[int]:
    """Yield the number of threads that each of so many trainings may use."""
    before = torch.get_num_threads()
    try:
        yield max(1, before // among)
    finally:
        torch.set_num_threads(before)


class _Beside:
    """Adds up the progress of several trainings, and stops all of them together."""

    def __init__(self, run: Run, trainings: Sequence[Training]) -> None:
        self.stopped = threading.Event()
        self._run, self._lock = run, threading.Lock()
        self._done = [0] * len(trainings)
        self._notes = [""] * len(trainings)
        self._total = sum(training.steps for training in trainings)

    def run(self, number: int) -> Run:
        """Return what one of the trainings is given."""

        def progress(done: int, total: int, note: str = "") -> None:
            with self._lock:
                self._done[number], self._notes[number] = done, note
                notes = ", ".join(filter(None, self._notes))
                self._run.progress(sum(self._done), self._total, notes)

        def event(name: str, /, **values: Any) -> None:
            with self._lock:
                self._run.event(name, **values)

        def stopping() -> bool:
            return self.stopped.is_set() or self._run.stopping()

        return replace(self._run, progress=progress, event=event, stopping=stopping)


def _train(run: Run, training: Training) -> Losses:
    name, updates, steps = training.name, training.updates, training.steps
    checkpoints = Checkpoints(run.directory / f"{name}-checkpoints", keep=1)
    losses: Losses = []
    if run.resume and (found := checkpoints.load(_State)) is not None:
        tensors, state = found
        updates.restore(tensors)
        losses = state.losses
        run.progress(len(losses), steps)
    for step in range(len(losses), steps):
        loss = training.loss_of(step)
        loss.backward()
        value = loss.item()  # waits for the device; these models are too small for it to matter
        if value != value:  # NaN is the only number that differs from itself
            raise TrainingError(
                f"the loss of {name} is not a number at step {step + 1}; lower its learning rate"
            )
        norm, _ = updates.step(step)
        if not math.isfinite(norm.item()):
            raise TrainingError(
                f"the gradient of {name} overflows at step {step + 1}; lower its learning rate"
            )
        losses.append((step + 1, value))
        last = step + 1 == steps
        if (step + 1) % _LOG_EVERY == 0 or last:
            run.event("train", phase=name, at=step + 1, loss=round(value, 6))
        run.progress(step + 1, steps, f"{name} loss {value:.3f}")
        stopping = run.stopping()
        if stopping or last or (step + 1) % _CHECKPOINT_EVERY == 0:
            checkpoints.save(step + 1, updates.tensors(), {"losses": losses})
        if stopping:
            raise Stopped
    training.end()
    return losses


def shuffled(positions: Sequence[int], size: int, *key: int) -> list[int]:
    """Return the items at these positions of an endless shuffled sequence of `size` items.

    Each round of `size` positions holds every item once. `key` and the number of the round decide
    the order within a round, so no state has to be saved to resume.
    """
    return [int(_round(size, *key, position // size)[position % size]) for position in positions]


@lru_cache(maxsize=4)
def _round(size: int, *key: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(key).permutation(size)
