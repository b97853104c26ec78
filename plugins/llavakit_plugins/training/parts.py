"""The parts of a model: which of them are trained, their precision, and how both are restored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavakit import TrainingError
from llavakit_plugins.training.kinds import Group
from llavakit_plugins.training.options import TrainOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from llavakit import LlavaModel

PARTS = ("vision", "connector", "language")


def parameters_of(model: LlavaModel, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a part by their names in the model.

    The separator row of a tiling goes with the connector: both make rows of images.
    """
    for name, parameter in getattr(model, part).named_parameters():
        yield f"{part}.{name}", parameter
    if part == "connector" and model.image_newline is not None:
        yield "image_newline", model.image_newline


def trainable(model: LlavaModel, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a part that learn where it is trained, as `parameters_of` does."""
    for name, parameter in getattr(model, part).trainable():
        yield f"{part}.{name}", parameter
    if part == "connector" and model.image_newline is not None:
        yield "image_newline", model.image_newline


def require_weights(part: str, count: int) -> None:
    """Raise TrainingError if a part that should be trained has no trainable parameter."""
    if not count:
        adapters = ", or give its weights of 4 bits adapters (`lora`)" * (part == "language")
        raise TrainingError(
            f"`{part}` has no parameters that learn; take it out of `train`{adapters}"
        )


@dataclass(frozen=True)
class _Before:
    """A parameter as it was before training, if training changes its precision."""

    dtype: torch.dtype
    weight: Tensor | None
    """The original values, on the CPU, of a frozen parameter that is rounded; else None."""


class Parts:
    """Prepares a model for training: trained weights are float32, frozen ones may be bfloat16.

    Trained weights stay float32 because an update is often smaller than the distance between two
    neighbouring bfloat16 numbers. Without `remember`, `tear_down` cannot restore the frozen ones.
    """

    def __init__(self, model: LlavaModel, options: TrainOptions, *, remember: bool) -> None:
        import torch  # not before: plans ask only for weights that learn

        self.model, self.options = model, options
        self._before: dict[str, dict[str, _Before]] = {}
        half = torch.bfloat16 if options.precision == "bf16" else torch.float32
        for part in PARTS:
            # by identity: tied weights have two names
            learns_here = trainable(model, part) if part in options.train else ()
            learning = {id(p) for _, p in learns_here}
            self._before[part] = {}
            for name, parameter in parameters_of(model, part):
                learns = id(parameter) in learning
                parameter.requires_grad_(learns)
                wanted = torch.float32 if learns else half
                if parameter.dtype != wanted and parameter.is_floating_point():
                    if remember or learns:
                        weight = None if learns else parameter.detach().cpu()
                        self._before[part][name] = _Before(parameter.dtype, weight)
                    # `.data`: the optimiser and ties keep the parameter itself
                    parameter.data = parameter.data.to(wanted)
        self.learn()
        model.language.recompute = options.recompute

    def learn(self) -> None:
        """Put the trained parts into training mode and the others into evaluation mode."""
        for part in PARTS:
            # dropout in a frozen part would only add noise
            getattr(self.model, part).train(part in self.options.train)

    def groups(self) -> list[Group]:
        """Return the optimiser's parameter groups, one for each trained part.

        Raises TrainingError if a part has no trainable parameter.
        """
        return [self._group(part, rate) for part, rate in self.options.train.items()]

    def _group(self, part: str, rate: float) -> Group:
        named = {name: p for name, p in trainable(self.model, part) if p.requires_grad}
        require_weights(part, len(named))
        return Group(named, rate, self.options.weight_decay)

    def as_before(self, name: str, weight: Tensor) -> Tensor:
        """Return a trained weight, of that name in the model, in its earlier precision."""
        before = next((known[name] for known in self._before.values() if name in known), None)
        return weight if before is None else weight.to(before.dtype)

    def tear_down(self) -> None:
        """Restore the precision of every parameter, and the values of frozen ones."""
        for befores in self._before.values():
            for name, before in befores.items():
                parameter = self.model.get_parameter(name)
                own = parameter.data if before.weight is None else before.weight
                parameter.data = own.to(parameter.device, before.dtype)
        self.model.requires_grad_(False).eval()
