"""The processes that train one model together: one for each device, started by torchrun.

    torchrun --nproc-per-node 8 "$(command -v llava-run)" recipes/llava13b.toml

The entry point `torchrun` of the group `llavakit.launchers` joins them; without it a run is one
process, and nothing here costs anything, not even torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from llavakit.contracts.run import ProcessGroup
from llavakit.registry.entry_points import only

if TYPE_CHECKING:
    import torch


def was_restarted() -> bool:
    """Say whether torchrun started this process again (`--max-restarts`): the run goes on."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


class Device:
    """The device of a process, looked up when it is first asked for: that takes torch."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.known: torch.device | None = None

    def __str__(self) -> str:
        return "none" if self.known is None else str(self.known)

    def find(self) -> torch.device:
        """Return the device. Raises ModelError where this machine has none of that name."""
        if self.known is None:
            from llavakit.model.load import pick_device

            self.known = pick_device(self._name)
        return self.known


@contextmanager
def join_process_group(name: str) -> Iterator[tuple[ProcessGroup, Device]]:
    """Yield this process's group and its device; `name` is the recipe's `device`.

    Raises RecipeError where there are more processes than devices, or a single device is named.
    """
    device, joined = Device(name), nullcontext((ProcessGroup(), None))
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():  # as torchrun sets them
        joined = only("llavakit.launchers", "torchrun")(name)
    with joined as (process_group, device.known):
        yield process_group, device
