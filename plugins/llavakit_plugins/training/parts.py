"""The parts of a model: which of them learn and in which precision, and how they are given back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit import LlavaModel, TrainingError
from llavakit_plugins.training.optimiser import Group
from llavakit_plugins.training.options import TrainOptions

PARTS = ("vision", "connector", "language")


def require_weights(part: str, count: int) -> None:
    """Raise TrainingError where a part that should learn has nothing to learn with."""
    if not count:
        adapters = ", or give its weights of 4 bits adapters (`lora`)" * (part == "language")
        raise TrainingError(
            f"`{part}` has no parameters that learn; take it out of `train`{adapters}"
        )


@dataclass(frozen=True)
class _Before:
    """A parameter as it was before training, where its precision is another meanwhile."""

    dtype: torch.dtype
    weight: Tensor | None
    """Of a frozen one that is rounded, its own values, off the device."""


class Parts:
    """A model made ready to learn: what learns is float32, what is frozen may be half of it.

    Without `remember` it cannot be made what it was before.
    """

    def __init__(self, model: LlavaModel, options: TrainOptions, *, remember: bool) -> None:
        self.model, self.options = model, options
        self._before: dict[str, dict[str, _Before]] = {}
        half = torch.bfloat16 if options.precision == "bf16" else torch.float32
        for part in PARTS:
            module = getattr(model, part)
            learning = {id(p) for _, p in module.trainable()} if part in options.train else set()
            self._before[part] = {}
            for name, parameter in module.named_parameters():
                learns = id(parameter) in learning
                parameter.requires_grad_(learns)
                wanted = torch.float32 if learns else half
                if parameter.dtype != wanted and parameter.is_floating_point():
                    if remember:
                        weight = None if learns else parameter.detach().cpu()
                        self._before[part][name] = _Before(parameter.dtype, weight)
                    parameter.data = parameter.data.to(wanted)
        self.learn()
        model.language.recompute = options.recompute

    def learn(self) -> None:
        """Put the parts that learn in training mode, the others in evaluation mode."""
        for part in PARTS:
            getattr(self.model, part).train(part in self.options.train)

    def groups(self) -> list[Group]:
        """Return what the optimiser changes. Raises TrainingError for a part without weights."""
        return [self._group(part, rate) for part, rate in self.options.train.items()]

    def _group(self, part: str, rate: float) -> Group:
        named = {
            f"{part}.{name}": parameter
            for name, parameter in getattr(self.model, part).trainable()
            if parameter.requires_grad
        }
        require_weights(part, len(named))
        return Group(named, rate, self.options.weight_decay)

    def tear_down(self) -> None:
        """Give every parameter its own precision back; one that was frozen, its own weights."""
        for part, befores in self._before.items():
            module = getattr(self.model, part)
            for name, before in befores.items():
                parameter = module.get_parameter(name)
                own = parameter.data if before.weight is None else before.weight
                parameter.data = own.to(parameter.device, before.dtype)
        self.model.requires_grad_(False).eval()
