"""What all processes that are forked here have in common: when, how they begin and how they ended.

A fork has everything that was made before it, without a copy, and is killed at any time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Thread
from typing import NoReturn

from llavakit import LlavaError, Stopped

_STOPS = (signal.SIGINT, signal.SIGTERM)


def may_fork() -> bool:
    """Whether this process may be forked: only Linux does so safely, and what was itself begun as
    a helper may begin no other process."""
    return sys.platform == "linux" and not is_helper()


def is_helper() -> bool:
    """Whether this process was begun as a helper of another one."""
    return multiprocessing.current_process().daemon


@contextmanager
def held_signals() -> Iterator[None]:
    """Keep signals until new processes have said what they do with them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        with warnings.catch_warnings():  # Python 3.12 advises against forks where threads are
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_helper(worker: int = 0) -> None:
    """Let this new process leave signals to the one that began it, and end when that one does.

    SIGINT and SIGTERM often reach the whole process group, also its helpers. The process that began
    them decides when to stop, and may need them until then: to save a checkpoint, say. One that
    outlived it could hold its lock of the run's folder. `worker` is what a DataLoader gives.
    """
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def begin_fork() -> None:
    """Do the same in a process that was forked under `held_signals`."""
    begin_helper()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def how_ended(code: int) -> str:
    """Return what became of a process with this exit code, as the end of a clause."""
    if -code == signal.SIGKILL:
        return "was killed, as a system does that runs out of memory"
    return f"was ended by signal {-code}" if code < 0 else f"ended ({code})"


def may_learn_in_forks() -> bool:
    """Whether a fork of this process can compute gradients.

    Not where autograd keeps threads, of which a fork would have none: beside an accelerator, and
    once torch.compile has been used. No function of PyTorch says so; a fork that tries it does.
    """
    import torch  # not before: other forks do without

    if torch.accelerator.is_available() or not may_fork():
        return False
    trial = multiprocessing.get_context("fork").Process(target=_try_to_learn, daemon=True)
    with held_signals():
        try:
            trial.start()
        except OSError:
            return False
    trial.join()
    return trial.exitcode == 0


def learn_in_fork(pipe: Connection, learn: Callable[[], object]) -> NoReturn:
    """Do the work of this process, which was forked for it, with one thread; then end it.

    What `learn` raises is sent through the pipe; where it is a fault of the code, with its place.
    """
    import torch

    code = 1
    try:
        begin_fork()
        # GNU's OpenMP waits for ever for the threads that were not forked
        torch.set_num_threads(1)
        try:
            learn()
        except Exception as error:
            if not isinstance(error, (Stopped, LlavaError)):
                error.add_note(traceback.format_exc())
            pipe.send(error)
        code = 0
    finally:
        os._exit(code)  # nothing that was begun before the fork may end here


def _try_to_learn() -> None:
    import torch

    code = 1
    try:
        torch.set_num_threads(1)
        torch.zeros((), requires_grad=True).backward()
        code = 0
    finally:
        os._exit(code)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
