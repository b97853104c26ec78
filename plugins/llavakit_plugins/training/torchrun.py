"""Joins the processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from llavakit.contracts.errors import RecipeError
from llavakit.contracts.run import ProcessGroup, T

_PATIENCE = timedelta(days=30)  # the others wait while the leader generates data, say


class Processes(ProcessGroup):
    """One process among those of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(int(flag))).item())

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor


def own_device(name: str) -> str:
    """Return this process's device; raises RecipeError as `join` does."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if local >= torch.cuda.device_count():
            raise RecipeError(
                f"torchrun started more processes than the {torch.cuda.device_count()} devices of "
                "this machine; lower --nproc-per-node"
            )
        torch.cuda.set_device(local)  # else each process opens a context on the first one, too
        return f"cuda:{local}"
    if name not in ("auto", "cpu"):
        raise RecipeError(f"torchrun gives every process a device, so `device = {name}` cannot be")
    return "cpu"  # gloo, which is left, knows no other device


@contextmanager
def join(name: str) -> Iterator[tuple[ProcessGroup, torch.device]]:
    """Yield this process as one of its group, and its device; `name` is the recipe's `device`.

    Raises RecipeError where there are more processes than devices, or a single device is named.
    """
    device = torch.device(own_device(name))
    # objects and flags travel by gloo, tensors on devices by nccl
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun restarts processes with the same store: addresses in it are of those that ended
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    how = {"store": store, "rank": rank, "world_size": size}
    dist.init_process_group(backend, timeout=_PATIENCE, **how)
    try:
        yield Processes(), device
    finally:
        dist.destroy_process_group()
