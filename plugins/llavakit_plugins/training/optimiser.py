"""AdamW over the parts that learn, with warm-up and decay, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llavakit import LlavaModel, TrainingError
from llavakit_plugins.training.options import TrainOptions


class Optimiser:
    """The trained parameters, one learning rate for each part."""

    def __init__(self, model: LlavaModel, options: TrainOptions, steps: int) -> None:
        self.options = options
        self.steps = steps
        self.warmup = math.ceil(options.warmup * steps)
        self.named: dict[str, nn.Parameter] = {}
        groups = []
        for part, rate in options.train.items():
            named = {
                f"{part}.{name}": parameter
                for name, parameter in getattr(model, part).named_parameters()
                if parameter.requires_grad
            }
            if not named:
                raise TrainingError(
                    f"`{part}` has no parameters that learn; take it out of `train`"
                )
            self.named |= named
            groups.append({"params": list(named.values()), "lr": rate, "peak": rate})
        self.adamw = torch.optim.AdamW(
            groups, betas=options.betas, weight_decay=options.weight_decay, fused=True
        )

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.options.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * done))

    def step(self, step: int) -> tuple[Tensor, float]:
        """Clip, update and clear the gradients; return their norm and the first part's rate."""
        norm = nn.utils.clip_grad_norm_(list(self.named.values()), self.options.clip)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * self.factor(step)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm, self.adamw.param_groups[0]["lr"]

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and their moments by name."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            for key, value in self.adamw.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned. Raises TrainingError where a tensor is missing."""
        for name, parameter in self.named.items():
            own = {
                key.partition("/")[0]: value
                for key, value in tensors.items()
                if key.partition("/")[2] == name
            }
            value = own.pop("parameter", None)
            if value is None or value.shape != parameter.shape:
                raise TrainingError(
                    f"the checkpoint lacks `{name}` of shape {tuple(parameter.shape)}; it belongs "
                    "to another recipe: start over without --resume"
                )
            parameter.copy_(value)
            self.adamw.state[parameter] = {
                key: moment if key == "step" else moment.to(parameter.device)
                for key, moment in own.items()
            }
