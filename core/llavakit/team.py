"""The processes that train one model together: one for each device, started by torchrun.

    torchrun --nproc-per-node 8 "$(command -v llava-run)" recipes/llava13b.toml

Without torchrun a run is a team of one, and nothing here costs anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from llavakit.errors import RecipeError
from llavakit.loading import pick_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
_PATIENCE = timedelta(days=30)  # the others wait while the leader generates data, say


@dataclass(frozen=True)
class Team:
    """One process's place among those of its run."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes, reports and does what needs one only."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Return the leader's value in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def any(self, flag: bool) -> bool:
        """Say in every process whether it is so in any of them."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag))).item())

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over the processes, in its place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mesh(self, kind: str) -> DeviceMesh:
        """Return all devices in one row, for sharding; `kind` is `cpu` or `cuda`."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(kind, (self.size,))


@contextmanager
def join_team(name: str) -> Iterator[tuple[Team, torch.device]]:
    """Yield this process's place and device; `name` is the recipe's `device`.

    Raises RecipeError where there are more processes than devices, or a single device is named.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:  # no torchrun
        yield Team(), pick_device(name)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if local >= torch.cuda.device_count():
            raise RecipeError(
                f"torchrun started more processes than the {torch.cuda.device_count()} devices of "
                "this machine; lower --nproc-per-node"
            )
        name = f"cuda:{local}"
        torch.cuda.set_device(local)
    elif name not in ("auto", "cpu"):
        raise RecipeError(f"torchrun gives every process a device, so `device = {name}` cannot be")
    device = pick_device(name)
    # objects and flags travel by gloo, tensors on devices by nccl
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
