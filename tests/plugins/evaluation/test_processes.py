"""The evaluate step's option `processes`: the same answers and losses, and nothing asked twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Command
from tests.plugins.evaluation.test_evaluate import (
    count_asked,
    model,
    model_folder,
    questions,
    recipe,
    rows,
)

from llavakit import LlavaModel
from llavakit_plugins.evaluation.answer_files import AnswerFile
from llavakit_plugins.training import forked
from llavakit_plugins.training.forks import may_fork

__all__ = ["model", "model_folder", "questions", "recipe"]  # fixtures, for the tests here, too

pytestmark = pytest.mark.skipif(not may_fork(), reason="only Linux forks")

Evaluates = Callable[..., tuple[Any, ...]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let this process compute with one thread, as the others do: to the same last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(data: Path) -> Sequence[str]:
    """What is measured: answers, with the images and with others', and two losses."""
    where = f"use = 'conversations', path = '{data}/train.json', images = '{data}/images'"
    losses = ", ".join(f"{{ {where}, kind = '{kind}' }}" for kind in ("one", "other"))
    chosen = ("batch_size=4", "blind=true", "max_length=64", f"losses=[{losses}]")
    return [text for one in chosen for text in ("--set", f"steps.evaluate.{one}")]


@pytest.fixture
def evaluate(
    recipe: Path, settings: Sequence[str], tmp_path: Path, llava_run: Command
) -> Evaluates:
    """A function that evaluates with so many processes and returns all that is found, and the
    answers as they are on the disk; where it fails, what is said."""

    def call(name: str, processes: int, code: int = 0, *, resume: bool = False) -> Any:
        out = tmp_path / name
        more = ("--set", f"steps.evaluate.processes={processes}", *["--resume"] * resume)
        ended = llava_run(recipe, "--out", out, *settings, *more)
        assert ended.code == code, ended.err
        assert not multiprocessing.active_children()
        if code:
            return ended.err
        step = out / "01-evaluate"
        assert not list(step.glob("*.rank*"))
        answers = {
            way: [{**row, "answer_id": "", "model_id": ""} for row in rows(step / f"{way}.jsonl")]
            for way in ("vqa", "vqa-blind")
        }
        done = json.loads((step / "artifact.json").read_text())
        return answers, done["metrics"], done["sections"]

    return call


def kept(tmp_path: Path, name: str) -> int:
    """Return how many answers a run that was ended left on the disk."""
    folder = tmp_path / name / "01-evaluate"
    return sum(len(rows(path)) for path in folder.glob("*.jsonl"))


def test_they_answer_and_measure_as_one_does(
    evaluate: Evaluates, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = count_asked(monkeypatch)
    one = evaluate("one", 1)
    assert {"loss_one", "loss_other"} <= one[1].keys()
    assert len(asked) == 60
    for processes in (2, 3):
        assert evaluate(f"forks{processes}", processes) == one
    assert len(asked) == 60  # all others were asked elsewhere
    monkeypatch.setattr(forked, "may_fork", lambda: False)
    assert evaluate("none", 2) == one
    assert len(asked) == 120


def test_no_more_are_begun_than_there_is_work(
    evaluate: Evaluates, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = evaluate("one", 1)
    begun: list[int] = []
    plain = forked.forked

    def counted(count: int, *given: Any) -> Any:
        begun.append(count)
        assert count < 100, "too many"  # before they are begun
        return plain(count, *given)

    for module in ("answering", "losses"):
        monkeypatch.setattr(f"llavakit_plugins.evaluation.{module}.forked", counted)
    assert evaluate("many", 100_000) == one
    assert begun == [8, 8, 2]  # 30 questions by 4, twice; a micro-batch of each set of data


def test_a_stop_keeps_what_was_answered(
    evaluate: Evaluates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches all processes; the others leave it to the one that saves."""
    whole = evaluate("whole", 1)
    append, calls = AnswerFile.append, [0]

    def interrupted(self: AnswerFile, *batch: Any) -> None:
        append(self, *batch)
        calls[0] += 1
        if calls[0] == 3:
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(AnswerFile, "append", interrupted)
    assert "stopping at the next safe point" in evaluate("run", 2, 130)
    before = kept(tmp_path, "run")
    assert before == 12  # of three batches
    monkeypatch.setattr(AnswerFile, "append", append)
    asked = count_asked(monkeypatch)
    monkeypatch.setattr(forked, "may_fork", lambda: False)
    assert evaluate("run", 2, resume=True) == whole
    assert len(asked) == 60 - before


@pytest.mark.parametrize("where", ["answer", "loss"])
def test_a_process_that_is_killed_is_said(
    evaluate: Evaluates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = evaluate("whole", 1)
    parent, plain, calls = os.getpid(), getattr(LlavaModel, where), [0]

    def killed(self: LlavaModel, *given: Any, **named: Any) -> Any:
        calls[0] += 1  # in each process
        if os.getpid() != parent and calls[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *given, **named)

    monkeypatch.setattr(LlavaModel, where, killed)
    # of each set of data, a micro-batch is one process's: the second one of a process is killed
    monkeypatch.setattr("llavakit_plugins.evaluation.losses._ROWS", 64)
    said = evaluate("run", 2, 2)
    did = {"answer": "answered questions", "loss": "measured losses"}[where]
    assert f"a process that {did} was killed, as a system does that runs out of memory" in said
    assert "run it again (a recipe with --resume)" in said
    assert "Traceback" not in said
    before = kept(tmp_path, "run")
    assert before in ((4, 8) if where == "answer" else (60,))
    monkeypatch.undo()
    asked = count_asked(monkeypatch)
    monkeypatch.setattr(forked, "may_fork", lambda: False)
    assert evaluate("run", 2, resume=True) == whole
    assert len(asked) == 60 - before


def test_an_image_that_cannot_be_read_is_named(
    evaluate: Evaluates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "13-0.png").unlink()
    said = evaluate("run", 2, 2)
    assert "13-0.png" in said
    assert "Traceback" not in said
