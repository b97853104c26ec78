"""Processes that share the samples of each step on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Command, RecipeWriter
from tests.forks import runs, where_forks_learn
from torch import nn

from llavakit_plugins.training import forks
from llavakit_plugins.training.loop import Trainer
from llavakit_plugins.training.measure import Measure
from llavakit_plugins.training.sharing import Learned, Sharing, shared

Learns = Callable[..., Any]
OPTIONS = (
    "cache_features=false",
    "checkpoint_every=1",
    "train={ connector = 1e-3, language = 1e-3 }",
    "held_out={ use = 'conversations', path = 'DATA/train.json', images = 'DATA/images' }",
    "validate_every=2",
)


@pytest.fixture
def learn(write_recipe: RecipeWriter, llava_run: Command, data: Path, tmp_path: Path) -> Learns:
    """A function that trains the second step; returns its events and weights, or what was said."""

    def call(name: str, *options: str, code: int = 0, resume: bool = False) -> Any:
        stated = [text.replace("DATA", str(data)) for text in (*OPTIONS, *options)]
        sets = [part for text in stated for part in ("--set", f"steps.finetune.{text}")]
        path, out = write_recipe(), tmp_path / name
        again = ("--resume",) * resume
        ended, _, err = llava_run(path, "--out", out, "--set", "steps.1.skip=true", *sets, *again)
        assert ended == code, err
        if code:
            return err
        lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        weights = load_file(out / "model" / "connector.safetensors")
        weights |= load_file(out / "model" / "language" / "model.safetensors")
        return [line for line in lines if line["event"] in ("train", "validation")], weights

    return call


def same(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return of events what does not depend on the machine's speed."""
    return [
        tuple(event.get(name) for name in ("at", "loss", "grad_norm", "held_out_loss", "answers"))
        for event in events
    ]


def assert_same(left: Any, right: Any) -> None:
    assert same(left[0]) == same(right[0])
    assert left[1].keys() == right[1].keys()
    for name, weight in left[1].items():
        assert torch.equal(weight, right[1][name]), name


@where_forks_learn
@pytest.mark.parametrize("processes", [2, 3])
def test_forks_learn_what_one_process_learns_in_turn(
    learn: Learns, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    threads = torch.get_num_threads()
    shares = f"processes={processes}"
    # a micro-batch of one or two samples: several to a share
    together = learn("forks", shares, "micro_batch_tokens=40")
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(forks, "may_fork", lambda: False)
    assert_same(together, learn("turns", shares, "micro_batch_tokens=40"))
    assert torch.get_num_threads() == threads


@where_forks_learn
def test_shares_arrive_where_one_process_does(learn: Learns) -> None:
    gentle = "train={ connector = 1e-4, language = 1e-4 }"
    events, weights = learn("two", "processes=2", gentle)
    alone_events, alone = learn("one", gentle)
    for one, other in zip(events, alone_events, strict=True):
        if one["event"] == "train":
            assert one["loss"] == pytest.approx(other["loss"], abs=4e-6)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)
            assert one["tflops"] > 0
        else:
            assert one["held_out_loss"] == pytest.approx(other["held_out_loss"], abs=4e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, alone[name], atol=4e-6, rtol=0)


@where_forks_learn
def test_more_processes_than_samples(learn: Learns) -> None:
    """Of 24 samples, the third step has 4."""
    events, _ = learn("many", "processes=5", "batch_size=10", "max_steps=3")
    alone, _ = learn("one", "batch_size=10", "max_steps=3")
    losses = [event["loss"] for event in alone if "loss" in event]
    assert [event["loss"] for event in events if "loss" in event] == pytest.approx(losses, abs=1e-4)


@where_forks_learn
def test_stopped_and_resumed_they_end_the_same(
    learn: Learns, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn("whole", "processes=2")
    steps: list[int] = []
    step = Trainer._step

    def stopped(self: Trainer, due: Any, found: Any) -> float:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, due, found)

    monkeypatch.setattr(Trainer, "_step", stopped)
    learn("broken", "processes=2", code=130)
    monkeypatch.setattr(Trainer, "_step", step)
    resumed = learn("broken", "processes=2", resume=True)
    assert_same((resumed[0][-len(whole[0]) :], resumed[1]), (whole[0], whole[1]))


@where_forks_learn
def test_what_a_fork_cannot_read_is_said_as_ever(learn: Learns, data: Path, tmp_path: Path) -> None:
    rows = json.loads((data / "train.json").read_text())
    images = tmp_path / "images"
    images.mkdir()
    for image in (data / "images").iterdir():
        (images / image.name).symlink_to(image)
    (images / "bad.png").write_bytes(b"no image")
    for row in rows:
        if "image" in row:
            row["image"] = "bad.png"
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    bad = f"data={{ use = 'conversations', path = '{tmp_path}/bad.json', images = '{images}' }}"
    said = learn("bad", "processes=2", bad, "batch_size=8", code=2)
    assert "bad.png" in said
    assert "Traceback" not in said


@where_forks_learn
def test_one_that_is_killed_is_said(learn: Learns, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, measured = os.getpid(), Measure.__call__

    def killed(self: Measure, batch: Any, features: Any) -> Any:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return measured(self, batch, features)

    whole = learn("whole", "processes=2")
    monkeypatch.setattr(Measure, "__call__", killed)
    said = learn("killed", "processes=2", code=2)
    assert "a process that shared the steps was killed" in said
    assert "--resume" in said
    monkeypatch.setattr(Measure, "__call__", measured)
    resumed = learn("killed", "processes=2", resume=True)
    assert_same((resumed[0][-len(whole[0]) :], resumed[1]), whole)


def test_compiled_blocks_are_refused_there(learn: Learns) -> None:
    said = learn("both", "processes=2", "compile=true", code=2)
    assert "processes" in said


# -- sums without a model --------------------------------------------------------------------------


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(n, dtype=torch.float32)) for n in (3, 1, 0, 5)]


def halves(
    ours: Sequence[nn.Parameter], share: int, fault: Callable[[], object] | None = None
) -> Iterator[Learned]:
    """Yield what comes of a share: gradients that hang on the weights; one weight has none."""
    for step in range(1000):
        if fault is not None and step == 1:
            fault()
        if share:
            ours[0].grad = ours[0].data * (share + 1)
        ours[3].grad = ours[3].data + share
        yield Learned(torch.tensor([float(share), 1.0]), 10.0)


@where_forks_learn
def test_sums_are_those_of_all_shares() -> None:
    ours = weights()
    before = [weight.data_ptr() for weight in ours]
    with shared(Sharing(ours), 3, lambda share: halves(ours, share)) as sharing:
        assert list(sharing.own) == [0]
        mine = halves(ours, 0)
        for step in range(3):
            value = float(step)
            total = sharing.add([next(mine)])
            assert total.sums.tolist() == [3.0, 3.0]
            assert total.flop == 30.0
            assert ours[1].grad is ours[2].grad is None
            assert ours[0].grad is not None
            assert ours[3].grad is not None
            assert ours[0].grad.tolist() == [5 * v for v in ours[0].data.tolist()]
            assert ours[3].grad.tolist() == [3 * v + 3 for v in ours[3].data.tolist()]
            for weight in ours:
                weight.grad = None
                weight.data += 1  # what the forks see in the next step
            assert ours[0].data.tolist() == [value + 1, value + 2, value + 3]
    assert [weight.data_ptr() for weight in ours] == before
    assert ours[3].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0]


@where_forks_learn
def test_a_fault_of_the_code_is_shown_where_it_was() -> None:
    def fault() -> None:
        raise ZeroDivisionError("a fault")

    ours = weights()

    def add() -> None:
        with shared(Sharing(ours), 2, lambda share: halves(ours, share, fault)) as sharing:
            mine = halves(ours, 0)
            for _ in range(3):
                sharing.add([next(mine)])

    with pytest.raises(ZeroDivisionError) as caught:
        add()
    assert "in fault" in caught.value.__notes__[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")
def test_no_process_outlives_the_one_that_forked_it(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.plugins.training.test_sharing import Sharing, halves, shared, weights
out, ours = Path({str(tmp_path)!r}), weights()
def known(share):
    (out / f"written{{share}}").write_text(str(os.getpid()))
    (out / f"written{{share}}").rename(out / f"process{{share}}")
    return halves(ours, share)
with shared(Sharing(ours), 3, known):
    while not all((out / f"process{{share}}").exists() for share in (1, 2)):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""
    found = subprocess.run([sys.executable, "-c", program], timeout=120, check=False)
    assert found.returncode == -signal.SIGKILL
    processes = [int((tmp_path / f"process{share}").read_text()) for share in (1, 2)]
    for _ in range(200):
        if not any(map(runs, processes)):
            return
        time.sleep(0.1)
    pytest.fail("a fork still runs")
