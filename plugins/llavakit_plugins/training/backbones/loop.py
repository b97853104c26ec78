"""A bare training loop with checkpoints, for backbones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
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


def train(run: Run, training: Training) -> Losses:
    """Train a network for its steps; return its losses.

    Saves a checkpoint every 200 steps and after the last. Raises TrainingError if a loss or a
    gradient is not finite, and Stopped, after saving, if the user asked to stop.
    """
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
