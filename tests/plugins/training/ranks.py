"""Several processes of one run, here threads, that wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from llavakit.contracts.run import ProcessGroup

T = TypeVar("T")


class Rank(ProcessGroup):
    """One of several processes. Raises BrokenBarrierError where the others do not come."""

    def __init__(self, rank: int, barrier: Barrier, given: list[Any]) -> None:
        self.rank, self.size = rank, barrier.parties
        self._barrier, self._given = barrier, given

    def broadcast(self, value: T) -> T:
        found: T = self._all(value)[0]
        return found

    def any(self, flag: bool) -> bool:
        return any(self._all(flag))

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._all(tensor.clone())).sum(0))

    def _all(self, value: Any) -> list[Any]:
        self._given[self.rank] = value
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found


def in_ranks(number: int, program: Callable[[Rank], T]) -> list[T | Exception]:
    """Return what each process gives or raises; who waits in vain gets a BrokenBarrierError."""
    barrier, given = Barrier(number, timeout=120), [None] * number

    def of(rank: int) -> T | Exception:
        try:
            return program(Rank(rank, barrier, given))
        except Exception as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(of, range(number)))
