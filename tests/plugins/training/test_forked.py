"""Shares of a job in forks: what comes of them, how they end, and where there are none."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import RecipeWriter
from tests.forks import runs

from llavakit import LlavaError, Recipe, Registry
from llavakit.contracts.run import ProcessGroup
from llavakit.model.folder import create_model
from llavakit_plugins.training import forked as module
from llavakit_plugins.training.forked import forked, shares_for
from llavakit_plugins.training.forks import may_fork

where_forks_are = pytest.mark.skipif(not may_fork(), reason="only Linux forks")


def squares(first: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield every third number below 20, its square, this process and its threads."""
    for number in range(first, 20, 3):
        yield number, number**2, os.getpid(), torch.get_num_threads()


@where_forks_are
def test_each_share_has_a_process_of_one_thread() -> None:
    found = sorted(forked(3, squares, "squared"))
    assert [row[:2] for row in found] == [(number, number**2) for number in range(20)]
    processes = {row[2] for row in found}
    assert len(processes) == 3
    assert os.getpid() not in processes
    assert {row[3] for row in found} == {1}
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("count", [1, 3])
def test_without_forks_this_process_does_all(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    monkeypatch.setattr(module, "may_fork", lambda: False)
    try:
        found = list(forked(count, squares, "squared"))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    numbers = [number for first in range(count) for number in range(first, 20, 3)]
    assert [row[0] for row in found] == numbers
    assert {row[2] for row in found} == {os.getpid()}
    assert {row[3] for row in found} == {1 if count > 1 else before + 1}


@where_forks_are
def test_what_a_share_raises_is_raised_here() -> None:
    def fault(first: int) -> Iterator[int]:
        yield first
        if first == 1:
            raise ZeroDivisionError("a fault")
        time.sleep(600)

    with pytest.raises(ZeroDivisionError) as caught:
        list(forked(2, fault, "failed"))
    assert "in fault" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()


@where_forks_are
def test_a_process_that_is_killed_is_one_sentence() -> None:
    def killed(first: int) -> Iterator[int]:
        yield first
        if first == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    with pytest.raises(LlavaError) as caught:
        list(forked(2, killed, "slept"))
    assert str(caught.value) == (
        "a process that slept was killed, as a system does that runs out of memory; close other "
        "programs, or set `processes` to 1, and run it again (a recipe with --resume)"
    )
    assert not multiprocessing.active_children()


@where_forks_are
def test_where_no_process_can_be_begun_those_that_were_end(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = multiprocessing.context.ForkProcess._Popen
    begun: list[Any] = []

    def refuse(process: multiprocessing.context.ForkProcess) -> object:
        if begun:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        begun.append(begin(process))
        return begun[0]

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "_Popen", staticmethod(refuse))
    with pytest.raises(
        LlavaError, match=r"no process could be begun that squared .*set `processes` to 1"
    ):
        list(forked(3, squares, "squared"))
    assert not runs(begun[0].pid)


@where_forks_are
def test_one_that_is_closed_leaves_no_process() -> None:
    def endless(first: int) -> Iterator[int]:
        while True:
            yield os.getpid()

    with closing(forked(3, endless, "counted")) as found:
        processes = {next(found) for _ in range(200)}
    assert processes
    assert not any(map(runs, processes))
    assert not multiprocessing.active_children()


@where_forks_are
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_none_outlives_the_one_that_forked_it(tmp_path: Path, how: signal.Signals) -> None:
    """SIGINT reaches all, as from a terminal, and the first one alone decides what it means."""
    program = f"""
import os, sys, time
from contextlib import closing
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from llavakit_plugins.training.forked import forked
def share(first):
    yield os.getpid()
    time.sleep(600)
with closing(forked(3, share, "slept")) as found:
    print(*[next(found) for _ in range(3)], flush=True)
    {"os.killpg(0" if how == signal.SIGINT else "os.kill(os.getpid()"}, {int(how)})
    next(found)
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, timeout=120, check=False, capture_output=True, text=True, start_new_session=True
    )
    assert ended.returncode == -how, ended.stderr
    processes = [int(number) for number in ended.stdout.split()]
    assert len(processes) == 3
    end = time.monotonic() + 60
    while any(map(runs, processes)):
        assert time.monotonic() < end, "a fork still runs"
        time.sleep(0.05)


def test_only_our_model_on_a_cpu_is_shared(write_recipe: RecipeWriter) -> None:
    class Two(ProcessGroup):
        size = 2

    registry = Registry.installed()
    model = create_model(Recipe.load(write_recipe(), registry).parts(), registry, seed=0)
    assert shares_for(model, ProcessGroup(), 3) == 3
    assert shares_for(model, Two(), 3) == 1
    assert shares_for(object(), ProcessGroup(), 3) == 1
    assert shares_for(model.to("meta"), ProcessGroup(), 3) == 1
