"""Steps of optimisers at scheduled rates, with a state that is saved and restored as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llavakit import PluginError, TrainingError
from llavakit_plugins.training.adamw import AdamW, AdamWOptions
from llavakit_plugins.training.kinds import Group, Optimiser, Schedule, Stateful
from llavakit_plugins.training.parallel import divided_like

ADAMW = AdamW(AdamWOptions())


class Rates:
    """The learning rate at each step, counted from 0, as a share of its peak.

    It rises from 0 to 1 in a share `warmup` of the steps, and then goes the way of the schedule.
    """

    def __init__(self, schedule: Schedule, steps: int, warmup: float) -> None:
        self._schedule, self._steps = schedule, steps
        self._rising = math.ceil(warmup * steps)  # rounded up, as by transformers' Trainer

    def __call__(self, step: int) -> float:
        if step < self._rising:
            return step / self._rising
        return self._schedule.share(step - self._rising, self._steps - self._rising)


def _taken_by(
    optimizers: Sequence[torch.optim.Optimizer], named: Mapping[str, nn.Parameter], whose: str
) -> dict[nn.Parameter, torch.optim.Optimizer]:
    """Return the one that updates each parameter. Raises PluginError where it is not one each."""
    if not isinstance(optimizers, Sequence) or not all(
        isinstance(one, torch.optim.Optimizer) for one in optimizers
    ):
        raise PluginError(
            f"optimiser `{whose}` returned {optimizers!r:.80} from `optimizers`; return a list of "
            "optimisers of torch"
        )
    taken: dict[nn.Parameter, torch.optim.Optimizer] = {}
    names = {parameter: name for name, parameter in named.items()}
    for one in optimizers:
        for parameter in (parameter for table in one.param_groups for parameter in table["params"]):
            if parameter not in names:
                raise PluginError(
                    f"optimiser `{whose}` takes a weight of shape {tuple(parameter.shape)} that is "
                    "not trained; its `optimizers` must take those of the groups alone"
                )
            if parameter in taken:
                raise PluginError(
                    f"optimiser `{whose}` takes `{names[parameter]}` twice; its `optimizers` must "
                    "take each parameter once"
                )
            taken[parameter] = one
    if missing := [name for name, parameter in named.items() if parameter not in taken]:
        raise PluginError(
            f"optimiser `{whose}` leaves out {len(missing)} parameters, the first is "
            f"`{missing[0]}`; its `optimizers` must take all of them"
        )
    return taken


class Updates:
    """Clips all gradients by their common norm and updates every group of parameters.

    `rates` gives the share of the peak at each step.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        rates: Callable[[int], float],
        *,
        optimiser: Optimiser = ADAMW,
        clip: float = 1.0,
    ) -> None:
        self.clip = clip
        self.named = {name: p for group in groups for name, p in group.named.items()}
        self.rates = [group.peak for group in groups]
        """The learning rate of each group in the last step; before the first one, the peak."""
        self._peaks, self._share = [group.peak for group in groups], rates
        self._stopped: Tensor | None = None
        self._optimizers = optimiser.optimizers(groups)
        self._of = _taken_by(self._optimizers, self.named, optimiser.name)
        for one in self._optimizers:
            for table in one.param_groups:
                table["peak"] = table["lr"]

    def step(self, step: int, loss: Tensor | None = None) -> tuple[Tensor, float]:
        """Update the weights and clear the gradients.

        Returns the gradient norm before clipping (a tensor on the device) and the learning rate of
        the first group. If the norm or `loss` of a step is not finite, this step and all later ones
        leave weights and state unchanged. With AdamW the device decides this by itself, so nothing
        here waits for the device; the caller reads the returned norm later.
        """
        norm = nn.utils.clip_grad_norm_(list(self.named.values()), self.clip)
        if isinstance(norm, DTensor):  # of sharded parameters: the norm is summed over the devices
            norm = norm.full_tensor()
        if loss is not None:
            norm = norm.to(loss.device)  # without any gradient, it is on the CPU
        finite = torch.isfinite(norm) if loss is None else torch.isfinite(norm + loss)
        stopped = (~finite).float()
        if self._stopped is not None:
            stopped = torch.maximum(stopped, self._stopped)
        self._stopped = stopped
        share = self._share(step)
        self.rates = [peak * share for peak in self._peaks]
        for optimizer in self._optimizers:
            for table in optimizer.param_groups:
                table["lr"] = table["peak"] * share
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                # a fused kernel skips the update where `found_inf` is 1, as GradScaler sets it
                optimizer.found_inf = stopped  # type: ignore[attr-defined]
                optimizer.step()
            elif not stopped.item():  # the others cannot: the host has to look
                optimizer.step()
        for parameter in self.named.values():
            parameter.grad = None  # no memory is held for gradients until the next ones come
        return norm, self.rates[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and their state as `parameter/NAME`, `exp_avg/NAME`, …"""
        return {
            f"{kind}/{name}": tensor
            for name, parameter in self.named.items()
            for kind, tensor in (("parameter", parameter.detach()), *self._state(parameter))
        }

    def _state(self, parameter: nn.Parameter) -> Iterable[tuple[str, Tensor]]:
        optimizer = self._of[parameter]
        if isinstance(optimizer, Stateful):
            return optimizer.saved(parameter).items()
        return optimizer.state[parameter].items() if parameter in optimizer.state else ()

    def place(self, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor, divided as its parameter is, to read a tensor of a checkpoint into."""
        kind, _, name = key.partition("/")
        parameter = self.named.get(name)
        if kind == "step" or parameter is None or parameter.shape != shape:
            return torch.empty(shape, dtype=dtype)
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned. Raises TrainingError if a tensor is missing."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            found.setdefault(name, {})[kind] = tensor
        for name, parameter in self.named.items():
            state = found.get(name, {})
            value = state.pop("parameter", None)
            if value is None or value.shape != parameter.shape:
                raise TrainingError(
                    f"the checkpoint lacks `{name}` of shape {tuple(parameter.shape)}; it belongs "
                    "to another recipe: start over without --resume"
                )
            parameter.copy_(divided_like(parameter, value))
            whole = {
                # the fused kernel needs the step count on the parameter's device, and undivided
                kind: tensor.to(parameter.device).reshape(()) if kind == "step"
                else divided_like(parameter, tensor)
                for kind, tensor in state.items()
            }  # fmt: skip
            optimizer = self._of[parameter]
            if isinstance(optimizer, Stateful):
                optimizer.restore(parameter, whole)
            else:
                optimizer.state[parameter] = whole
