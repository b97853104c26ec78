"""Shares the samples of each step among processes of one machine, on a CPU.

A step of a small network gains little from more than one thread. Here each process computes the
gradients of its share with one, from weights in memory that all of them see; the process that
forked the others adds all gradients, in one order, and updates the weights. Where no fork could
learn, one process computes all shares in turn, to the same bits.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from mmap import mmap
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from llavakit import TrainingError
from llavakit_plugins.training.forks import (
    held_signals,
    how_ended,
    learn_in_fork,
    may_learn_in_forks,
    threads,
)


class Learned(NamedTuple):
    """What a share came to besides its gradients."""

    sums: Tensor
    """The loss and the objective's figures, float32, `[1 + F]`."""
    flop: float


class Sharing:
    """Adds up the gradients of all shares of a step; this process computes all of them, in turn.

    `weights` are those that learn.
    """

    def __init__(self, weights: Iterable[nn.Parameter], shares: int = 1) -> None:
        self.weights, self.own = list(weights), range(shares)

    def add(self, learned: Iterable[Learned]) -> Learned:
        """Take what comes of the own shares, of which each leaves its gradients; return the sum.

        The sum of the gradients is left where a backward pass leaves it.
        """
        found: list[Learned] = []
        kept: list[list[Tensor | None]] = []
        for one in learned:
            found.append(one)
            if len(self.own) > 1:
                kept.append([weight.grad for weight in self.weights])
                for weight in self.weights:
                    weight.grad = None
        for gradients in kept:
            _add(self.weights, gradients)
        return _sum(found)

    def resting(self) -> AbstractContextManager[None]:
        """Let this process compute with all its threads meanwhile: no share is due."""
        return nullcontext()


@contextmanager
def shared(
    alone: Sharing, shares: int, learn: Callable[[int], Iterator[Learned]]
) -> Iterator[Sharing]:
    """Yield what adds up the gradients of so many shares of each step; of one, it is `alone`.

    `learn` gives, in a fork, what comes of one share of each step, one step after another: the next
    is asked for when the weights are those of the next step. They are in other memory meanwhile.
    """
    if shares == 1:
        yield alone
        return
    weights, before = alone.weights, torch.get_num_threads()
    with threads(1):
        if not may_learn_in_forks():
            yield _InTurn(weights, shares, before)
            return
        forks: list[_Fork] = []
        privates = [weight.data for weight in weights]
        try:
            for weight, seen in zip(weights, _shared_like(privates), strict=True):
                weight.data = seen
            with held_signals():
                for share in range(1, shares):
                    forks.append(_Fork(weights, share, learn))
            yield _WithForks(weights, forks, before)
        finally:
            for fork in forks:
                fork.end()
            for weight, private in zip(weights, privates, strict=True):
                weight.data = private.copy_(weight.data)


class _InTurn(Sharing):
    def __init__(self, weights: Iterable[nn.Parameter], shares: int, count: int) -> None:
        super().__init__(weights, shares)
        self._threads = count

    def resting(self) -> AbstractContextManager[None]:
        return threads(self._threads)


class _WithForks(_InTurn):
    """This process computes the first share, and each fork one of the others."""

    def __init__(self, weights: Iterable[nn.Parameter], forks: Sequence[_Fork], count: int) -> None:
        super().__init__(weights, 1, count)
        self._forks = forks

    def add(self, learned: Iterable[Learned]) -> Learned:
        for fork in self._forks:
            fork.ask()
        found = [super().add(learned)]
        for fork in self._forks:
            one, gradients = fork.answer()
            found.append(one)
            _add(self.weights, gradients)
        return _sum(found)


class _Fork:
    """A process that computes one share of each step, as the one that forked it sees it."""

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        share: int,
        learn: Callable[[int], Iterator[Learned]],
    ) -> None:
        self._weights, self._share, self._learn = weights, share, learn
        self._gradients = _shared_like([weight.data for weight in weights])
        context = multiprocessing.get_context("fork")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=self._work, args=(there,), daemon=True)
        try:
            self._process.start()
        except OSError as error:
            raise TrainingError(
                f"no process could be begun to share steps with ({error}); close other programs, "
                "or set processes = 1"
            ) from error
        there.close()  # the end of the pipe says that of the process

    def ask(self) -> None:
        """Let it begin its share of the next step."""
        with suppress(OSError):  # where it has ended, `answer` says why
            self._pipe.send(True)

    def answer(self) -> tuple[Learned, list[Tensor | None]]:
        """Return what came of it, and the gradients, which stay until the next step is asked for.

        Raises what it raised, and TrainingError where it was killed.
        """
        try:
            said = self._pipe.recv()
        except (EOFError, OSError):
            self._raise_end()
        if isinstance(said, Exception):
            raise said
        sums, flop, has = said
        gradients = [g if here else None for g, here in zip(self._gradients, has, strict=True)]
        return Learned(torch.tensor(sums), flop), gradients

    def end(self) -> None:
        """Let it end, and wait for it."""
        with suppress(OSError):
            self._pipe.send(False)  # the pipe's end is no sign: later forks have a copy of it
        self._pipe.close()
        self._process.join()

    def _raise_end(self) -> NoReturn:
        self._process.join()
        how = how_ended(self._process.exitcode or 0)
        raise TrainingError(
            f"a process that shared the steps {how}; close other programs, and go on with --resume"
        )

    def _work(self, pipe: Connection) -> None:
        """Compute a share of each step that is asked for, in the process that was forked for it."""

        def learn() -> None:
            steps = self._learn(self._share)
            while pipe.recv():
                sums, flop = next(steps)
                pipe.send((sums.tolist(), flop, self._left()))

        learn_in_fork(pipe, learn)

    def _left(self) -> list[bool]:
        """Put the gradients where the other process sees them; return which weights have one."""
        has = []
        for weight, place in zip(self._weights, self._gradients, strict=True):
            has.append(weight.grad is not None)
            if weight.grad is not None:
                place.copy_(weight.grad)
                weight.grad = None
        return has


def _add(weights: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is None:
            continue
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


def _sum(found: Sequence[Learned]) -> Learned:
    if len(found) == 1:
        return found[0]
    total = found[0].sums
    for one in found[1:]:
        total = total + one.sums
    return Learned(total, sum(one.flop for one in found))


def _shared_like(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return copies of tensors in memory that forks of this process share with it.

    It is no file: /dev/shm has 64 MB in a container, as a rule.
    """
    found = []
    for tensor in tensors:
        memory = mmap(-1, max(1, tensor.numel()) * tensor.element_size())
        seen = torch.frombuffer(memory, dtype=tensor.dtype)[: tensor.numel()]
        found.append(seen.view(tensor.shape).copy_(tensor))
    return found
