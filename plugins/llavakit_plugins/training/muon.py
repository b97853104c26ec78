"""Muon for matrices, AdamW for all else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llavakit_plugins.training.adamw import AdamWOptions, Beta, fused_adamw
from llavakit_plugins.training.kinds import Group, Optimiser

if TYPE_CHECKING:
    import torch


class MuonOptions(AdamWOptions):
    momentum: Beta = 0.95
    """How much of the mean of gradients is kept at each step."""
    nesterov: bool = True
    """Whether the mean is looked at a step ahead (Nesterov)."""
    iterations: int = Field(default=5, ge=1, lt=100)
    """Newton-Schulz iterations that make an update orthogonal."""
    stacked: bool = False
    """Make all matrices of one shape orthogonal together, in float32 instead of bfloat16: faster
    where they are small and many, and on a CPU without products in bfloat16. Those that are divided
    over devices are gathered one by one, and so made orthogonal in float32."""
    by_adamw: tuple[str, ...] = ("embed", "head")
    """Matrices whose names hold one of these texts are updated by AdamW, with `betas` and `eps`: a
    table of embeddings and a head are no maps between hidden states."""


class Muon(Optimiser):
    """Muon (arXiv 2502.16982) as torch has it, for weights that are matrices; AdamW for the others.

    Updates are scaled to the size of AdamW's, so that its learning rates are right for both.
    """

    name = "muon"
    Options = MuonOptions
    options: MuonOptions
    state_bytes = 4.0

    def optimizers(self, groups: Sequence[Group]) -> Sequence[torch.optim.Optimizer]:
        import torch  # not before: plans ask only what its state takes
        from torch.distributed.tensor import DTensor

        from llavakit_plugins.training.muon_divided import DividedMuon
        from llavakit_plugins.training.muon_stacked import StackedMuon

        tables: list[dict[str, Any]] = []
        others: list[Group] = []
        for group in groups:
            mine = {name for name, p in group.named.items() if p.ndim == 2 and self._takes(name)}
            rest = {name: p for name, p in group.named.items() if name not in mine}
            if mine:
                params = [group.named[name] for name in group.named if name in mine]
                own = {"lr": group.peak, "weight_decay": group.weight_decay}
                tables.append({"params": params, **own})
            if rest:
                others.append(Group(rest, group.peak, group.weight_decay))
        found: list[torch.optim.Optimizer] = []
        stacked = self.options.stacked
        how: dict[str, Any] = {k: getattr(self.options, k) for k in ("momentum", "nesterov")}
        iterations = self.options.iterations
        if any(isinstance(parameter, DTensor) for one in tables for parameter in one["params"]):
            dtype = torch.float32 if stacked else torch.bfloat16
            found.append(DividedMuon(tables, iterations=iterations, dtype=dtype, **how))
        elif tables and stacked:
            found.append(StackedMuon(tables, iterations=iterations, **how))
        elif tables:
            how |= {"ns_steps": iterations, "adjust_lr_fn": "match_rms_adamw"}
            found.append(torch.optim.Muon(tables, **how))
        if others:
            found.append(fused_adamw(others, self.options))
        return found

    def _takes(self, name: str) -> bool:
        last = name.rpartition(".")[0] or name  # of `lm_head.weight`, the layer
        return not any(text in last for text in self.options.by_adamw)
