"""The built-in schedules. Their values are those of transformers' `get_*_schedule` functions."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from llavakit import Options
from llavakit_plugins.training.kinds import Schedule


class Constant(Schedule):
    """The peak, all the time."""

    name = "constant"

    def share(self, step: int, steps: int) -> float:
        return 1.0


class FallingOptions(Options):
    floor: float = Field(default=0.0, ge=0, le=1)
    """The rate at the end, as a share of the peak."""


class Cosine(Schedule):
    """Half a cosine, from the peak to the floor."""

    name = "cosine"
    Options = FallingOptions
    options: FallingOptions

    def share(self, step: int, steps: int) -> float:
        fallen = 0.5 * (1.0 + math.cos(math.pi * (step / max(1, steps))))
        return self.options.floor + (1.0 - self.options.floor) * fallen


class Linear(Schedule):
    """A straight line, from the peak to the floor."""

    name = "linear"
    Options = FallingOptions
    options: FallingOptions

    def share(self, step: int, steps: int) -> float:
        left = max(0.0, (steps - step) / max(1, steps))
        return self.options.floor + (1.0 - self.options.floor) * left


class WsdOptions(FallingOptions):
    decay: float = Field(default=0.1, gt=0, le=1)
    """Share of the steps behind the warm-up in which the rate falls, at the end."""
    shape: Literal["cosine", "linear", "1-sqrt"] = "cosine"
    """The way in which it falls."""


class Wsd(Schedule):
    """Warm-up, stable, decay: the peak, until the rate falls at the end (arXiv 2404.06395)."""

    name = "wsd"
    Options = WsdOptions
    options: WsdOptions

    def share(self, step: int, steps: int) -> float:
        falling = math.ceil(self.options.decay * steps)
        if step < steps - falling:
            return 1.0
        done = (step - (steps - falling)) / max(1, falling)
        fallen = {
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
            "linear": 1.0 - done,
            "1-sqrt": 1.0 - math.sqrt(done),
        }[self.options.shape]
        return self.options.floor + (1.0 - self.options.floor) * fallen
