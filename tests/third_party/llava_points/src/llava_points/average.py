"""A callback: a moving average of the connector's weights takes their place at the end."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from llavakit import Options
from llavakit_plugins.training.callbacks import Callback, Training


class AverageOptions(Options):
    decay: float = Field(default=0.5, ge=0, lt=1)


class Average(Callback):
    """Keeps the average beside the run, too, for whoever resumes it."""

    name = "average"
    Options = AverageOptions
    options: AverageOptions

    def begin(self, training: Training) -> None:
        self.kept = training.run.directory / "average.pt"
        if training.step and self.kept.is_file():
            self.average = torch.load(self.kept, weights_only=True)
        else:
            self.average = self._copied(training)

    @torch.no_grad()
    def on_step(self, training: Training) -> None:
        decay = self.options.decay
        for name, now in training.model.connector.named_parameters():
            self.average[name].lerp_(now, 1 - decay)
        torch.save(self.average, self.kept)
        training.run.event("average", at=training.step)

    @torch.no_grad()
    def end(self, training: Training) -> None:
        for name, now in training.model.connector.named_parameters():
            now.copy_(self.average[name])

    def _copied(self, training: Training) -> dict[str, Tensor]:
        named = training.model.connector.named_parameters()
        return {name: tensor.detach().clone() for name, tensor in named}
