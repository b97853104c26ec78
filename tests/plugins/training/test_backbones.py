"""Backbones from nothing: what they read, see and learn."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.forks import runs, where_forks_learn
from tests.runs import run_in
from torch import Tensor, nn

from llavakit import PromptTemplate, Registry, Stopped, TrainingError, Use
from llavakit.contracts.data import IMAGE
from llavakit_plugins.generation.scenes import compose
from llavakit_plugins.generators.offline import Offline, OfflineOptions
from llavakit_plugins.training import forks
from llavakit_plugins.training.backbones.distortions import Distortions, varied_patches
from llavakit_plugins.training.backbones.loop import Training
from llavakit_plugins.training.backbones.side_by_side import optimise
from llavakit_plugins.training.backbones.text import documents
from llavakit_plugins.training.backbones.tokenizer import train_tokenizer
from llavakit_plugins.training.kinds import Group
from llavakit_plugins.training.optimiser import Rates, Updates
from llavakit_plugins.training.schedules import Cosine, FallingOptions


def words(text: str) -> list[str]:
    return sorted(re.findall(r"\w+", text.lower()))


def test_a_document_begins_with_the_words_of_a_caption_in_any_order() -> None:
    contexts = [
        scene.context(str(number), "x.png")
        for number, scene in enumerate(compose("train", 8, 0, most=1))
    ]
    choice = {"use": "vicuna_v1", "system": ""}
    template = Registry.installed().build(Use[PromptTemplate].model_validate(choice))
    teacher = Offline(OfflineOptions())
    found = list(documents(contexts, teacher, template, train_tokenizer([], 0), seed=0))
    assert len(found) == len(contexts)
    in_order = 0
    for context, document in zip(contexts, found, strict=True):
        text = "".join(segment.text for segment in document)
        assert IMAGE not in text
        first = document[1] if document[0].text.startswith("USER") else document[0]
        assert not first.supervised, "what stands for the image is never learned"
        said = first.text.partition("\n")[0]
        assert words(said) in [words(caption) for caption in context.captions]
        in_order += any(said in re.sub(r"[^\w ]", "", c.lower()) for c in context.captions)
        supervised = [segment.text for segment in document if segment.supervised]
        assert supervised[-1] == "</s>"
        values = {box.category for box in context.boxes}
        assert any(value in text.lower() for value in values for text in supervised)
    assert in_order < len(found) / 4


# -- the loop ------------------------------------------------------------------------------------


def training(name: str, steps: int = 6, seed: int = 0, bad: int = -1) -> Training:
    """Return a small regression; at the step `bad` its loss is no number."""
    torch.manual_seed(seed)
    layer = nn.Linear(64, 64)
    group = Group(dict(layer.named_parameters()), 0.01)

    def loss_of(step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        loss: Tensor = (layer(torch.randn(128, 64, generator=draw)) - 1).square().mean()
        return loss * (math.nan if step == bad else 1)

    rates = Rates(Cosine(FallingOptions()), steps, 0.0)
    return Training(name, Updates([group], rates), steps, loss_of, lambda: ended.append(name))


ended: list[str] = []


def weights_of(training: Training) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in training.updates.named.items()}


@where_forks_learn
def test_side_by_side_they_learn_what_each_learns_alone(tmp_path: Path) -> None:
    ended.clear()
    said: list[tuple[int, int]] = []
    told: list[tuple[str, int]] = []
    run = replace(
        run_in(tmp_path / "both"),
        progress=lambda done, total, note="": said.append((done, total)),
        event=lambda name, /, **values: told.append((values["phase"], values["at"])),
    )
    threads = torch.get_num_threads()
    both = training("one", 6), training("other", 9, seed=1)
    losses = optimise(run, *both)
    assert torch.get_num_threads() == threads
    assert sorted(ended) == ["one", "other"]
    assert sorted(told) == [("one", 6), ("other", 9)]
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert said[-1] == (15, 15)
    for number, each in enumerate((training("one", 6), training("other", 9, seed=1))):
        torch.set_num_threads(1 if number else max(1, threads - 1))
        (alone,) = optimise(run_in(tmp_path / str(number)), each)
        torch.set_num_threads(threads)
        assert losses[number] == alone
        assert [step for step, _ in alone] == list(range(1, each.steps + 1))
        mine = weights_of(both[number])
        for name, weight in weights_of(each).items():
            assert torch.equal(mine[name], weight)


@where_forks_learn
def test_when_one_fails_the_other_saves_and_stops(tmp_path: Path) -> None:
    ended.clear()
    run = run_in(tmp_path / "run")
    with pytest.raises(TrainingError, match="the loss of bad is not a number at step 3"):
        optimise(run, training("good", 10**6), training("bad", 9, bad=2))
    assert ended == []
    assert [path.name for path in tmp_path.glob("run/*-checkpoints")] == ["good-checkpoints"]


@where_forks_learn
def test_stopped_and_resumed_they_end_the_same(tmp_path: Path) -> None:
    whole = training("one", 60), training("other", 90, seed=1)
    expected = optimise(run_in(tmp_path / "whole"), *whole)
    asked: list[int] = []

    def stopping() -> bool:
        asked.append(1)
        return len(asked) > 20

    run = run_in(tmp_path / "run", stopping=stopping)
    first = training("one", 60), training("other", 90, seed=1)
    with pytest.raises(Stopped):
        optimise(run, *first)
    again = training("one", 60, seed=7), training("other", 90, seed=8)
    resumed = replace(run_in(tmp_path / "run"), resume=True)
    assert optimise(resumed, *again) == expected
    for one, other in zip(whole, again, strict=True):
        mine = weights_of(other)
        for name, weight in weights_of(one).items():
            assert torch.equal(mine[name], weight)


@where_forks_learn
def test_one_that_is_waited_for_stops_when_asked(tmp_path: Path) -> None:
    asked: list[int] = []

    def stopping() -> bool:
        asked.append(1)
        return len(asked) > 8

    run = run_in(tmp_path / "run", stopping=stopping)
    with pytest.raises(Stopped):
        optimise(run, training("one", 6), training("other", 10**6))
    assert sorted(path.name for path in tmp_path.glob("run/*")) == [
        "one-checkpoints",
        "other-checkpoints",
    ]


def test_where_processes_cannot_be_forked_they_learn_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = optimise(run_in(tmp_path / "both"), training("one", 6), training("other", 9))
    monkeypatch.setattr(forks, "may_fork", lambda: False)
    ended.clear()
    found = optimise(run_in(tmp_path / "after"), training("one", 6), training("other", 9))
    assert found == expected
    assert ended == ["one", "other"]


def test_after_torch_compile_they_learn_in_this_process(tmp_path: Path) -> None:
    """PyTorch refuses gradients in the forks of a process that has compiled some."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
import torch
from tests.plugins.training.test_backbones import optimise, run_in, training
weight = torch.ones(2, requires_grad=True)
torch.compile(lambda: (weight * 2).sum(), backend="aot_eager")().backward()
losses = optimise(run_in(Path({str(tmp_path)!r})), training("one", 6), training("other", 9))
assert [len(each) for each in losses] == [6, 9]
"""
    subprocess.run([sys.executable, "-c", program], timeout=240, check=True)


def failing(error: Callable[[], object]) -> Training:
    """Return a training whose third step fails."""
    good = training("bad", 9)

    def loss_of(step: int) -> Tensor:
        if step == 2:
            error()
        return good.loss_of(step)

    return replace(good, loss_of=loss_of)


@where_forks_learn
def test_one_that_is_killed_is_said_and_can_be_resumed(tmp_path: Path) -> None:
    bad = failing(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(TrainingError, match=r"that trained bad was killed.*--resume"):
        optimise(run_in(tmp_path / "run"), training("good", 10**6), bad)
    assert list(tmp_path.glob("run/good-checkpoints/*"))
    whole = optimise(run_in(tmp_path / "whole"), training("good", 6), training("bad", 9))
    resumed = replace(run_in(tmp_path / "run"), resume=True)
    assert optimise(resumed, training("good", 6), training("bad", 9))[1] == whole[1]


@where_forks_learn
def test_a_fault_of_the_code_is_shown_where_it_was(tmp_path: Path) -> None:
    def fault() -> None:
        raise ZeroDivisionError("a fault")

    with pytest.raises(ZeroDivisionError) as caught:
        optimise(run_in(tmp_path), training("good", 10**6), failing(fault))
    assert "in fault" in caught.value.__notes__[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")
def test_no_process_outlives_the_one_that_forked_it(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.plugins.training.test_backbones import failing, optimise, replace, run_in, training
out = Path({str(tmp_path)!r})
own, other = failing(lambda: os.kill(os.getpid(), signal.SIGKILL)), training("other", 10**6)
def known(step):
    if not step:
        (out / "written").write_text(str(os.getpid()))
        (out / "written").rename(out / "process")
    return other.loss_of(step)
def wait(step):
    while not (out / "process").exists():
        pass
    return own.loss_of(step)
optimise(run_in(out / "run"), replace(own, loss_of=wait), replace(other, loss_of=known))
"""
    found = subprocess.run([sys.executable, "-c", program], timeout=120, check=False)
    assert found.returncode == -signal.SIGKILL
    process = int((tmp_path / "process").read_text())
    for _ in range(200):
        if not runs(process):
            return
        time.sleep(0.1)
    pytest.fail("the fork still runs")


# -- distortions ---------------------------------------------------------------------------------


def images(edge: int = 8) -> Tensor:
    """Return two images of 3 x 3 patches, all of one colour but for one patch in each."""
    torch.manual_seed(0)
    found = torch.full((2, 3, 3 * edge, 3 * edge), 0.5)
    found[0, :, :edge, edge : 2 * edge] = torch.rand(3, edge, edge)
    found[1, :, edge : 2 * edge, 2 * edge :] = torch.rand(3, edge, edge)
    return found


def distorted(distortions: Distortions, draw: np.random.Generator) -> Tensor:
    found = images()
    distortions.change(found, varied_patches(found, 8), 8, draw)
    return found


def test_distortions_leave_the_patches_of_one_colour() -> None:
    given = images()
    changed = distorted(
        Distortions(rotate=30, scale=0.2, shear=0.2, shift=2), np.random.default_rng(0)
    )
    moved = (changed != given).any(1)
    assert moved[0, :8, 8:16].any()
    assert moved[1, 8:16, 16:].any()
    moved[0, :8, 8:16] = moved[1, 8:16, 16:] = False
    assert not moved.any()
    torch.testing.assert_close(distorted(Distortions(), np.random.default_rng(0)), given)


class Turns(np.random.Generator):
    """Draws the upper limit of whatever is asked for."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def uniform(self, low: float, high: float, size: Any) -> Any:  # type: ignore[override]
        return np.full(size, high)


def test_a_quarter_turn_and_a_shift_are_exact() -> None:
    given = images()
    patch = given[0, :, :8, 8:16]
    turned = distorted(Distortions(rotate=90), Turns())[0, :, :8, 8:16]
    torch.testing.assert_close(turned, patch.rot90(1, (1, 2)), atol=1e-5, rtol=0)
    shifted = distorted(Distortions(shift=2), Turns())[0, :, :8, 8:16]
    # each pixel comes from two to the right and two below, and the edge is repeated
    far = torch.arange(8).add(2).clamp(max=7)
    torch.testing.assert_close(shifted, patch[:, far][:, :, far], atol=1e-5, rtol=0)
    wide = distorted(Distortions(scale=0.5), Turns())[0, :, :8, 8:16]
    assert wide[:, 0, 0].tolist() == pytest.approx(patch[:, 0, 0].tolist(), abs=1e-5)
