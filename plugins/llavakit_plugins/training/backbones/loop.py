"""A bare training loop with checkpoints, for backbones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llavakit import Run, Stopped, TrainingError
from llavakit_plugins.training.checkpoints import Checkpoints
from llavakit_plugins.training.optimiser import Updates

_CHECKPOINT_EVERY = 200
_LOG_EVERY = 20


@dataclass(frozen=True)
class _State:
    losses: list[tuple[int, float]]


def optimise(
    run: Run, name: str, updates: Updates, steps: int, loss_of: Callable[[int], Tensor]
) -> list[tuple[int, float]]:
    """Run so many steps of updates; return (step, loss) pairs, steps from 1.

    `loss_of(step)` must depend on the step and the weights only: then a resumed run computes what
    an uninterrupted run computes. Saves a checkpoint every 200 steps. Raises TrainingError if loss
    or gradient is not finite, and Stopped, after saving, if the user asked to stop.
    """
    checkpoints = Checkpoints(run.directory / f"{name}-checkpoints", keep=1)
    losses: list[tuple[int, float]] = []
    if run.resume and (found := checkpoints.load(_State)) is not None:
        tensors, state = found
        updates.restore(tensors)
        losses = state.losses
    for step in range(len(losses), steps):
        loss = loss_of(step)
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
