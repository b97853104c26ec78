"""The progress of training: steps, samples and tokens so far, and the speed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from llavakit_plugins.training.validation import Look


@dataclass
class Progress:
    """Counters of training. A checkpoint holds them besides its tensors; names are its format."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Optimisation steps done within the epoch."""
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, float, Sequence[str]]] = field(default_factory=list)
    """Validations so far: step, held-out loss, answers."""

    @property
    def best(self) -> Look | None:
        """The validation with the lowest held-out loss; the first one if several are equal."""
        # `min` would keep a NaN that comes first
        finite = [Look(*look) for look in self.looks if math.isfinite(look[1])]
        return min(finite, key=lambda look: look.loss, default=None)


class Meter:
    """Measures samples and tokens per second since the last measurement."""

    def __init__(self, progress: Progress) -> None:
        self._look(progress)

    def _look(self, progress: Progress) -> None:
        self._time, self._samples, self._tokens = (
            time.monotonic(),
            progress.samples,
            progress.tokens,
        )

    def rates(self, progress: Progress) -> dict[str, float]:
        """Return samples and tokens per second since the last call, by their names in events."""
        # a clock of 16 ms may stand still for a step
        seconds = max(time.monotonic() - self._time, 1e-9)
        samples = (progress.samples - self._samples) / seconds
        tokens = (progress.tokens - self._tokens) / seconds
        self._look(progress)
        return {"samples_per_s": round(samples, 2), "tokens_per_s": round(tokens)}
