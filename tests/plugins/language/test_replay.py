"""Recorded steps of decoding, with a stand-in for CUDA's graphs that runs again what it saw.

That recorded steps give the same on a device is checked by tests/benchmarks/gpu.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from llavakit.contracts.packing import KVCache, Packing
from llavakit_plugins.language import replay
from llavakit_plugins.language.replay import Replay


class Graph:
    """Keeps the call that ran while it was recorded, and repeats it into the same output."""

    open: Graph | None = None
    seen: list[Graph]
    out: Tensor
    again: Callable[[], Tensor]

    def capture_begin(self, pool: Any = None, **options: Any) -> None:
        assert (pool is None) == (not Graph.seen), "memory is shared with what is still there"
        Graph.open = self
        Graph.seen.append(self)
        self.replays = 0

    def capture_end(self) -> None:
        Graph.open = None

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def replay(self) -> None:
        self.replays += 1
        self.out.copy_(self.again())


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    Graph.seen = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return Graph.seen


def hidden(embeds_SE: Tensor, packing: Packing) -> Tensor:
    """What depends on the row, its place, and what the cache holds."""

    def value() -> Tensor:
        assert packing.cache is not None
        held = packing.cache.keys[0]
        assert held is not None
        return embeds_SE * 2 + packing.position_ids_T[:, None] + held.sum()

    out = value()
    if Graph.open is not None:
        Graph.open.out, Graph.open.again = out, value
    return out


def step(run: Replay, cache: KVCache, number: int) -> None:
    count = len(cache.lengths)
    embeds = torch.full((count, 3), float(number))
    packing = Packing(tuple(range(count + 1)), torch.tensor(cache.lengths), cache)
    found = run(hidden, embeds, packing)
    torch.testing.assert_close(found, hidden(embeds, packing))
    cache.advance(packing)


def filled(count: int, lengths: int) -> KVCache:
    cache = KVCache(1, [lengths + 400] * count)
    cache.keys[0] = torch.arange(count).view(-1, 1, 1, 1).float()
    cache.values[0] = torch.zeros(count, 1, 1, 1)
    cache.lengths = [lengths] * count
    return cache


def test_steps_are_recorded_after_some_and_give_the_same(graphs: list[Graph]) -> None:
    run, cache = Replay(), filled(3, 10)
    for number in range(6):
        step(run, cache, number)
    assert [graph.replays for graph in graphs] == [6 - replay._BEFORE]


def test_sequences_that_end_begin_another_recording(graphs: list[Graph]) -> None:
    run, cache = Replay(), filled(3, 10)
    for number in range(4):
        step(run, cache, number)
    cache.select([0, 2])
    for number in range(4):
        step(run, cache, number)
    assert len(graphs) == 2


def test_another_length_begins_another_recording(graphs: list[Graph]) -> None:
    run, cache = Replay(), filled(1, 256 - 4)
    for number in range(9):  # the fifth looks at one column more than that length has
        step(run, cache, number)
    assert [graph.replays for graph in graphs] == [2, 3]


def test_caches_of_several_answers_do_not_meet(graphs: list[Graph]) -> None:
    run, caches = Replay(), [filled(1, 10), filled(2, 30)]
    for number in range(5):
        for cache in caches:
            step(run, cache, number)
    assert [graph.replays for graph in graphs] == [3, 3]


def test_nothing_of_an_answer_stays_behind_it() -> None:
    run, cache = Replay(), filled(1, 10)
    step(run, cache, 0)
    assert len(run._of) == 1
    del cache
    assert len(run._of) == 0


def test_a_step_that_cannot_be_recorded_runs_as_usual(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Graph) -> None:
        Graph.open = None
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Graph, "capture_end", refuse)
    run, cache = Replay(), filled(1, 10)
    for number in range(replay._BEFORE):
        step(run, cache, number)
    with pytest.warns(UserWarning, match=r"cannot be recorded \(operation not permitted when"):
        step(run, cache, 8)
    for number in range(3):
        step(run, cache, number)
    assert len(graphs) == 1  # it is not tried again


def test_a_copy_of_a_model_records_its_own_steps() -> None:
    run, cache = Replay(), filled(1, 10)
    for number in range(4):
        step(run, cache, number)
    assert len(copy.deepcopy(run)._of) == 0


def test_on_a_cpu_nothing_is_recorded() -> None:
    packing = Packing((0, 1), torch.tensor([10]), filled(1, 10))
    with torch.no_grad():
        assert not replay.is_step(torch.ones(1, 3), packing)


def test_a_recorded_step_that_gives_something_else_is_not_believed(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "replay", lambda self: self.out.fill_(3.0))
    run, cache = Replay(), filled(1, 10)
    for number in range(replay._BEFORE):
        step(run, cache, number)
    with pytest.warns(UserWarning, match="a recorded one gave something else"):
        step(run, cache, 8)
    for number in range(3):
        step(run, cache, number)
    assert len(graphs) == 1
