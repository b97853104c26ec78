"""AdamW, fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from llavakit import Options
from llavakit_plugins.training.kinds import Group, Optimiser

if TYPE_CHECKING:
    import torch

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWOptions(Options):
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """How much of the means of gradients, and of their squares, is kept at each step."""
    eps: float = Field(default=1e-8, gt=0, lt=1)
    """Added to the root of the mean square, so that nothing is divided by 0."""


class AdamW(Optimiser):
    """AdamW (arXiv 1711.05101) as torch has it, in one fused kernel."""

    name = "adamw"
    Options = AdamWOptions
    options: AdamWOptions

    def optimizers(self, groups: Sequence[Group]) -> Sequence[torch.optim.Optimizer]:
        return [fused_adamw(groups, self.options)]


def fused_adamw(groups: Sequence[Group], options: AdamWOptions) -> torch.optim.AdamW:
    """Return torch's AdamW of some groups, each at its own rate."""
    import torch  # not before: plans ask only what its state takes

    tables: list[dict[str, Any]] = [
        {"params": [*group.named.values()], "lr": group.peak, "weight_decay": group.weight_decay}
        for group in groups
    ]
    return torch.optim.AdamW(tables, betas=options.betas, eps=options.eps, fused=True)
