"""Does the shares of a job in processes of one machine, each with one thread.

The processes are forks, which have all that was made before without a copy. Each sends what it
finds to the process that forked it, which alone writes files and shows progress. So a fork may be
killed at any time, and at the end all are: what takes long ends at once, which no pool does.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, TypeVar

from llavakit import LlavaError, LlavaModel
from llavakit.contracts.run import ProcessGroup
from llavakit_plugins.training.forks import (
    held_signals,
    how_ended,
    learn_in_fork,
    may_fork,
    threads,
)

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_REMEDY = "close other programs, or set `processes` to 1, and run it again (a recipe with --resume)"


def shares_for(model: Any, group: ProcessGroup, processes: int) -> int:
    """Return among how many of the `processes` that a recipe states work with a model is shared.

    One alone where the model is on a GPU or none of ours, whose threads a fork would lack, and
    under torchrun, where all cores have work.
    """
    return shares_on(model.device, group, processes) if isinstance(model, LlavaModel) else 1


def shares_on(device: torch.device, group: ProcessGroup, processes: int) -> int:
    """Return the same of work on a device."""
    return processes if device.type == "cpu" and group.size == 1 else 1


def forked(count: int, share: Callable[[int], Iterable[T]], did: str) -> Generator[T]:
    """Yield what comes of the shares 0 to `count` - 1 of a job, as it comes. Must be closed.

    One share is done by this process, as if there were no others to do. Of several, each is done
    by a fork, or by this process in turn, where it cannot be forked; with one thread either way.
    What comes of a share is pickled.

    Raises what a share raises, and LlavaError where its process was killed; `did` says what for.
    """
    if count == 1:
        yield from share(0)
    elif may_fork():
        with _forks(count, share, did) as forks:
            yield from _received(forks, did)
    else:
        with threads(1):
            for number in range(count):
                yield from share(number)


_Forks = dict[Connection, BaseProcess]
"""What each of the processes sends, and the process."""


@contextmanager
def _forks(count: int, share: Callable[[int], Iterable[T]], did: str) -> Iterator[_Forks]:
    """Yield forks that do one share each, and end them."""
    context = multiprocessing.get_context("fork")
    forks: _Forks = {}
    try:
        with held_signals():
            for number in range(count):
                here, there = context.Pipe(duplex=False)
                process: BaseProcess
                process = context.Process(target=_do, args=(there, share, number), daemon=True)
                try:
                    process.start()
                except OSError as error:
                    here.close()
                    raise LlavaError(
                        f"no process could be begun that {did} ({error}); {_REMEDY}"
                    ) from error
                finally:
                    there.close()  # the end of the pipe says that of the process
                forks[here] = process
        yield forks
    finally:
        for process in forks.values():
            process.kill()  # it has nothing to put away
        for pipe, process in forks.items():
            process.join()
            pipe.close()


def _received(forks: _Forks, did: str) -> Iterator[T]:
    going = dict(forks)
    while going:
        for pipe in wait([*going]):
            assert isinstance(pipe, Connection)
            try:
                found = pipe.recv()
            except (EOFError, OSError):
                process = going[pipe]
                process.join()
                how = how_ended(process.exitcode or 0)
                raise LlavaError(f"a process that {did} {how}; {_REMEDY}") from None
            if isinstance(found, Exception):
                raise found
            if found:
                yield found[0]
            else:
                del going[pipe]


def _do(pipe: Connection, share: Callable[[int], Iterable[T]], number: int) -> None:
    """Send what comes of a share, from the process that was forked for it, and in the end ()."""

    def send() -> None:
        gc.freeze()  # what is not looked at stays shared
        for found in share(number):
            pipe.send((found,))
        pipe.send(())

    learn_in_fork(pipe, send)
