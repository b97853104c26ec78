"""What a step is given, where a test calls it, or a part of it, by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llavakit import Registry, Run
from llavakit.contracts.run import ProcessGroup


def run_in(
    folder: Path,
    build: Callable[..., Any] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Run:
    """Return the run of a step in `folder`, which is made: one process on the CPU, no model."""
    folder.mkdir(parents=True, exist_ok=True)
    return Run(
        directory=folder,
        earlier={},
        build=build or Registry.installed().build,
        seed=0,
        resume=False,
        find_device=lambda: torch.device("cpu"),
        model=None,  # type: ignore[arg-type]
        progress=lambda done, total, note="": None,
        event=lambda name, /, **values: None,
        stopping=stopping,
        process_group=ProcessGroup(),
    )
