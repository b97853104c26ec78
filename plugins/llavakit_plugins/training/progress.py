"""How far a training step is, and how fast it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from llavakit_plugins.training.validation import Look


@dataclass
class Progress:
    """How far a training step is; all that a checkpoint holds besides tensors."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Steps done within the epoch."""
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, float, Sequence[str]]] = field(default_factory=list)
    """Of the validation: step, held-out loss, answers."""

    @property
    def best(self) -> Look | None:
        """The look with the lowest held-out loss, the first of several."""
        finite = [Look(*look) for look in self.looks if math.isfinite(look[1])]
        return min(finite, key=lambda look: look.loss, default=None)


class Meter:
    """Samples and tokens a second since the last look."""

    def __init__(self, progress: Progress) -> None:
        self._look(progress)

    def _look(self, progress: Progress) -> None:
        self._time, self._samples, self._tokens = (
            time.monotonic(),
            progress.samples,
            progress.tokens,
        )

    def rates(self, progress: Progress) -> dict[str, float]:
        seconds = max(time.monotonic() - self._time, 1e-9)
        samples = (progress.samples - self._samples) / seconds
        tokens = (progress.tokens - self._tokens) / seconds
        self._look(progress)
        return {"samples_per_s": round(samples, 2), "tokens_per_s": round(tokens)}
