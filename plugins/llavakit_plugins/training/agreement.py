"""Errors that all processes of a run raise together: one alone would leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from llavakit import LlavaError
from llavakit.contracts.run import ProcessGroup

_LONGEST = 4000  # bytes of an error that is sent to the other processes

T = TypeVar("T")


def in_main(group: ProcessGroup, make: Callable[[], T]) -> T | None:
    """Return what `make` gives in the main process, and None in others; raise its error in all."""
    found, problem = None, None
    if group.is_main:
        try:
            found = make()
        except LlavaError as error:
            problem = error
    said = group.broadcast(None if problem is None else str(problem))
    if problem is not None:
        raise problem
    if said is not None:
        raise LlavaError(said)
    return found


def in_each(group: ProcessGroup, make: Callable[[], T]) -> T:
    """Return what `make` gives in this process, when that of the last process has ended.

    Where it raises LlavaError in some, all raise that of the first of them. `make` must not wait
    for other processes.
    """
    try:
        found = make()
    except LlavaError as error:
        raise_first(group, error)
        raise
    raise_first(group, None)
    return found


def raise_first(group: ProcessGroup, problem: LlavaError | None) -> None:
    """Raise in every process the problem of the first that has one: its samples come first."""
    if group.size == 1:
        if problem is not None:
            raise problem
        return
    has = torch.zeros(group.size, dtype=torch.int64)
    has[group.rank] = problem is not None
    first = next((rank for rank, found in enumerate(group.sum(has).tolist()) if found), None)
    if first is None:
        return
    text = torch.zeros(_LONGEST, dtype=torch.int64)
    if problem is not None and first == group.rank:
        said = np.frombuffer(str(problem).encode()[:_LONGEST], np.uint8).astype(np.int64)
        text[: len(said)] = torch.from_numpy(said)
    sent = group.sum(text).numpy().astype(np.uint8).tobytes().rstrip(b"\0")
    if problem is not None and first == group.rank:
        raise problem
    raise LlavaError(sent.decode(errors="replace"))
