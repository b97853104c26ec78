"""Norms of the weights that learn, as they change: for trackers."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from llavakit import PARTS, Options
from llavakit_plugins.training.callbacks import Callback, Training


class NormsOptions(Options):
    every: int = Field(default=100, ge=1)
    """Steps from one event to the next; the first and the last have one, too."""


class Norms(Callback):
    """Tells trackers the norm of each part's weights that learn, in the event `norms`."""

    name = "norms"
    Options = NormsOptions
    options: NormsOptions

    def begin(self, training: Training) -> None:
        if training.step == 0:
            self._tell(training)

    def on_step(self, training: Training) -> None:
        if training.step % self.options.every == 0 or training.step == training.steps:
            self._tell(training)

    @torch.no_grad()
    def _tell(self, training: Training) -> None:
        found = {}
        for part in PARTS:
            learning = [p for p in getattr(training.model, part).parameters() if p.requires_grad]
            # of weights that are divided, each norm is summed over the devices
            norms = [float(torch.linalg.vector_norm(p.detach().float())) for p in learning]
            if norms:
                found[part] = math.hypot(*norms)
        training.run.event("norms", at=training.step, **found)
