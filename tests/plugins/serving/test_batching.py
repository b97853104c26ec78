"""Requests that join and leave a batch: who waits for whom, and what is kept of those who left."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.plugins.serving.conftest import asks, picture, receive, request, serving, until

from llavakit import LlavaModel, packed_attention
from llavakit.contracts.model import Sampling
from llavakit.contracts.packing import KVCache, Packing
from llavakit_plugins.serving.batch import Prompt
from llavakit_plugins.serving.cache import SharedCache
from llavakit_plugins.serving.metrics import Metrics
from llavakit_plugins.serving.scheduler import Job, Scheduler, Update
from llavakit_plugins.serving.torch_batch import TorchBatch
from llavakit_plugins.serving.writing import Piece, Voice


class Recorded(TorchBatch):
    """Notes what is done, in order: ("read", rows) and ("step", answers)."""

    def __init__(self, model: LlavaModel, chunk: int) -> None:
        super().__init__(model, chunk)
        self.done: list[tuple[str, int]] = []

    def read(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        before = {id(prompt): prompt.read for prompt in prompts}
        touched = super().read(prompts)
        self.done.append(("read", sum(p.read - before[id(p)] for p in touched)))
        return touched

    def step(self, tokens: Sequence[int]) -> Any:
        self.done.append(("step", len(tokens)))
        return super().step(tokens)


class Desk:
    """Submits jobs to a scheduler and keeps what it delivers."""

    def __init__(self, model: LlavaModel, chunk: int = 16, places: int = 8) -> None:
        self.model, self.batch = model, Recorded(model, chunk)
        self.voice = Voice(model.tokenizer, model.end_ids)
        self.found: dict[int, list[Any]] = {}
        self.changed = threading.Condition()
        self.scheduler = Scheduler(
            self.batch, self.voice, places=places, waiting=64, deliver=self._take, metrics=Metrics()
        )

    def job(self, text: str, tokens: int, *images: bytes) -> Job:
        messages = asks(text, *images)
        encoded, shown = self.model.ask(messages, ())
        length = encoded.length(self.model.visual_tokens)
        prompt = Prompt(encoded, self.model.prepare(shown), length, tokens)
        sampling = Sampling(tokens, stop=self.model.stops)
        return Job(prompt, [self.voice.begin(encoded.ids.tolist(), sampling, 0, tokens)])

    def _take(self, updates: list[Update]) -> None:
        with self.changed:
            for job, _, what in updates:
                self.found.setdefault(id(job), []).append(what)
            self.changed.notify_all()

    def wait(self, job: Job, true: Callable[[list[Any]], bool]) -> list[Any]:
        with self.changed:
            assert self.changed.wait_for(lambda: true(self.found.get(id(job), [])), 30)
            return list(self.found[id(job)])

    def end(self, job: Job) -> list[Piece]:
        return self.wait(job, lambda found: bool(found) and found[-1].finish is not None)


@pytest.fixture
def desk(endless: LlavaModel) -> Any:
    desk = Desk(endless)
    yield desk
    desk.scheduler.stop()
    assert desk.scheduler.error is None


def test_a_long_prompt_is_read_a_chunk_between_two_tokens_of_others(desk: Desk) -> None:
    writes = desk.job("what is it ?", 400)
    desk.scheduler.start()
    desk.scheduler.submit(writes)
    desk.wait(writes, lambda found: len(found) > 3)
    long = desk.job("is the picture red ? " * 30, 4)
    assert long.prompt.length > 100
    desk.scheduler.submit(long)
    desk.end(long)
    begun = next(n for n, (what, rows) in enumerate(desk.batch.done) if what == "read" and n)
    during = desk.batch.done[begun:]
    reads = [rows for what, rows in during if what == "read"]
    assert sum(reads) == long.prompt.length
    assert max(reads) <= 16
    order = [what for what, _ in during]
    last = len(order) - 1 - order[::-1].index("read")
    assert order[: last + 1 : 2] == ["read"] * len(reads)  # and a step after each
    assert order[1:last:2] == ["step"] * (len(reads) - 1)


def test_a_short_prompt_overtakes_a_long_one(desk: Desk) -> None:
    long = desk.job("is the picture red ? " * 60, 2)
    short = desk.job("what is it ?", 2)
    desk.scheduler.submit(long)
    desk.scheduler.submit(short)
    desk.scheduler.start()
    desk.end(long)
    ends = list(desk.found)
    assert ends.index(id(short)) < ends.index(id(long))
    first = desk.batch.done[: desk.batch.done.index(("step", 1))]
    assert len(first) <= 2  # one chunk of the long prompt, at most


def test_short_prompts_are_read_as_one_stream(desk: Desk, endless: LlavaModel) -> None:
    desk.batch._chunk = 200
    jobs = [desk.job("what is it ?", 3), desk.job("is the circle red ?", 3)]
    for job in jobs:
        desk.scheduler.submit(job)
    desk.scheduler.start()
    texts = ["".join(piece.text for piece in desk.end(job)) for job in jobs]
    assert desk.batch.done[0] == ("read", sum(job.prompt.length for job in jobs))
    questions = ("what is it ?", "is the circle red ?")
    assert texts == [endless.generate(text, max_new_tokens=3) for text in questions]


def test_who_goes_away_frees_the_place_before_the_next_step(desk: Desk) -> None:
    stays, leaves = desk.job("what is it ?", 600), desk.job("is it red ?", 5000, picture(1))
    for job in (stays, leaves):
        desk.scheduler.submit(job)
    desk.scheduler.start()
    desk.wait(leaves, lambda found: len(found) > 3)
    desk.scheduler.drop(leaves)
    pieces = desk.end(stays)
    count = len(desk.found[id(leaves)])
    assert 3 < count < 600
    assert "".join(piece.text for piece in pieces) == desk.model.generate(
        "what is it ?", max_new_tokens=600
    )
    until(lambda: desk.scheduler.busy == 0)
    assert len(desk.batch) == 0


def test_a_model_that_fails_fails_those_requests_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, other = desk.job("what is it ?", 3000), desk.job("is it red ?", 5)
    desk.scheduler.start()
    desk.scheduler.submit(writes)
    desk.wait(writes, lambda found: len(found) > 3)
    step = desk.batch.step

    def once(tokens: Sequence[int]) -> Any:
        monkeypatch.setattr(desk.batch, "step", step)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(desk.batch, "step", once)
    desk.wait(writes, lambda found: isinstance(found[-1], RuntimeError))
    desk.scheduler.submit(other)
    text = "".join(piece.text for piece in desk.end(other))
    assert text == desk.model.generate("is it red ?", max_new_tokens=5)


def test_the_shared_cache_equals_one_for_each() -> None:
    """Sequences of a random play of joins, steps and leaves, against a list of tensors."""
    draw = torch.Generator().manual_seed(5)
    layers, heads, width = 2, 3, 4
    shared = SharedCache(layers)
    truth: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys of layer 0, a state of layer 1

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    for _ in range(120):
        move = int(torch.randint(4, (), generator=draw))
        if move == 0 and len(truth) < 9:
            length = int(torch.randint(1, 300, (), generator=draw))
            own = KVCache(layers, [length])
            keys, state = rand(length, heads, width), rand(1, 5)
            packing = Packing.of([length])
            packed_attention(keys, keys, keys * 2, replace(packing, cache=own), layer=0)
            own.states[1]["s"] = state
            own.advance(packing)
            shared.join(own, 0, length + 40)
            truth.append((keys, state))
        elif move == 1 and truth:
            count = int(torch.randint(1, len(truth) + 1, (), generator=draw))
            places = torch.randperm(len(truth), generator=draw)[:count].tolist()
            order = shared.leave(places)
            assert sorted(order) == sorted(set(range(len(truth))) - set(places))
            truth = [truth[place] for place in order]
        elif truth:
            new = rand(len(truth), heads, width)
            positions = torch.tensor(shared.lengths)
            packing = Packing(tuple(range(len(truth) + 1)), positions, shared)
            packed_attention(new, new, new * 2, packing, layer=0)
            shared.advance(packing)
            truth = [(torch.cat((keys, row[None])), state)
                     for (keys, state), row in zip(truth, new, strict=True)]  # fmt: skip
        assert shared.lengths == [len(keys) for keys, _ in truth]
        for place, (keys, state) in enumerate(truth):
            stored, values = shared.keys[0], shared.values[0]
            assert stored is not None
            assert values is not None
            assert len(stored) == len(truth)
            torch.testing.assert_close(stored[place, :, : len(keys)].transpose(0, 1), keys)
            torch.testing.assert_close(values[place, :, : len(keys)].transpose(0, 1), keys * 2)
            torch.testing.assert_close(shared.states[1]["s"][place], state[0])


def test_a_full_queue_says_when_to_come_again(endless: LlavaModel) -> None:
    body = {"messages": asks("what is it ?"), "max_tokens": 9000, "stream": True}
    with serving(endless, places=1, queue=1) as server:
        open_ones = []
        for _ in range(2):  # one is written, one waits
            connection = server.connect()
            connection.sendall(request("/v1/chat/completions", body))
            open_ones.append(connection)
            until(lambda: server.server.scheduler.busy == len(open_ones))
        status, headers, data = server.send("/v1/chat/completions", body)
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert json.loads(data)["error"]["type"] == "rate_limit_error"
        open_ones[0].close()  # the next gets the place
        assert open_ones[1].recv(20).startswith(b"HTTP/1.1 200")
        open_ones[1].close()
        until(lambda: server.server.scheduler.busy == 0)


def test_answers_wait_for_memory(endless: LlavaModel) -> None:
    """Two answers that may grow too long together are written one after the other."""
    batch = TorchBatch(endless, 64, cache_rows=1000)
    assert batch.fits([990])
    assert batch.fits([400, 400])
    assert not batch.fits([600, 100])
    assert batch.fits([5000])  # alone it may try


def test_a_thread_that_ends_leaves_nobody_waiting(
    endless: LlavaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no code foresees: requests get an answer of status 500 or 503, and health says it."""

    def broken() -> None:
        raise MemoryError

    with serving(endless) as server:
        scheduler = server.server.scheduler
        body = {"messages": asks("what is it ?"), "max_tokens": 9000}
        with server.connect() as connection:
            connection.sendall(request("/v1/chat/completions", body))
            until(lambda: scheduler.busy == 1)
            monkeypatch.setattr(scheduler, "_turn", broken)
            assert receive(connection)[0] == 500
        assert server.send("/v1/chat/completions", body)[0] == 503
        assert server.send("/health")[0] == 503
        assert isinstance(scheduler.error, MemoryError)
        scheduler.error = None  # as it was meant to
