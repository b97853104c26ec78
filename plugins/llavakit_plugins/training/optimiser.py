"""AdamW with a learning-rate schedule, whose state is saved and restored as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llavakit import TrainingError
from llavakit_plugins.training.parallel import divided_like


@dataclass(frozen=True)
class Schedule:
    """The learning rate at each step, as a share of its peak."""

    steps: int
    warmup: float
    """Share of the steps in which the rate rises from 0, 0 to 1."""
    kind: Literal["cosine", "constant"] = "cosine"

    def __call__(self, step: int) -> float:
        """Return the share of the peak at `step`, counted from 0.

        The same as transformers' `get_cosine_schedule_with_warmup`: with a warm-up, 0 at step 0.
        """
        rising = math.ceil(self.warmup * self.steps)  # rounded up, as by transformers' Trainer
        if step < rising:
            return step / rising
        if self.kind == "constant":
            return 1.0
        done = (step - rising) / max(1, self.steps - rising)
        return 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that share a peak learning rate and a weight decay."""

    named: Mapping[str, nn.Parameter]
    peak: float
    weight_decay: float = 0.0


class Optimiser:
    """Clips all gradients by their common norm and updates every group with fused AdamW."""

    def __init__(
        self,
        groups: list[Group],
        schedule: Schedule,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = 1.0,
    ) -> None:
        self.schedule, self.clip = schedule, clip
        self.named = {name: p for group in groups for name, p in group.named.items()}
        self._stopped: Tensor | None = None
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": list(group.named.values()),
                    "lr": group.peak,
                    "peak": group.peak,
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ],
            betas=betas,
            fused=True,
        )

    def step(self, step: int, loss: Tensor | None = None) -> tuple[Tensor, float]:
        """Update the weights and clear the gradients.

        Returns the gradient norm before clipping (a tensor on the device) and the learning rate of
        the first group. If the norm or `loss` of a step is not finite, this step and all later ones
        leave weights and state unchanged. The device decides this by itself, so nothing here waits
        for the device; the caller reads the returned norm later.
        """
        norm = nn.utils.clip_grad_norm_(list(self.named.values()), self.clip)
        if isinstance(norm, DTensor):  # of sharded parameters: the norm is summed over the devices
            norm = norm.full_tensor()
        finite = torch.isfinite(norm) if loss is None else torch.isfinite(norm + loss)
        stopped = (~finite).float()
        if self._stopped is not None:
            stopped = torch.maximum(stopped, self._stopped)
        self._stopped = stopped
        # AdamW's fused kernel skips the update where `found_inf` is 1; GradScaler sets it likewise
        self._adamw.found_inf = stopped  # type: ignore[attr-defined]
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * self.schedule(step)
        self._adamw.step()
        # None: no memory is held for gradients until the next ones come
        self._adamw.zero_grad(set_to_none=True)
        return norm, self._adamw.param_groups[0]["lr"]

    @property
    def rates(self) -> list[float]:
        """The learning rate of each group in the last step."""
        return [group["lr"] for group in self._adamw.param_groups]

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and their AdamW state as `parameter/NAME`, `exp_avg/NAME`, …"""
        return {
            f"{kind}/{name}": tensor
            for name, parameter in self.named.items()
            for kind, tensor in self._state(parameter)
        }

    def _state(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        yield "parameter", parameter.detach()
        yield from self._adamw.state[parameter].items()

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
            self._adamw.state[parameter] = {
                # the fused kernel needs the step count on the parameter's device, and undivided
                kind: tensor.to(parameter.device).reshape(()) if kind == "step"
                else divided_like(parameter, tensor)
                for kind, tensor in state.items()
            }  # fmt: skip
