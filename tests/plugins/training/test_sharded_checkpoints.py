"""Checkpoints of divided weights: after faults, and with other numbers of processes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import RecipeWriter
from tests.core import processes
from tests.plugins.training.test_sharded import events, losses, same, sets, tensors

GENTLE = {
    "steps.1.skip": "true",
    "steps.finetune.train": "{ connector = 1e-4, language = 1e-4 }",
}


def with_faults(arguments: list[str]) -> int:
    """Run the command; in the first attempts, something happens to one process."""
    from llavakit.cli import main
    from llavakit_plugins.training.checkpoints import Checkpoints
    from llavakit_plugins.training.loop import Trainer

    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    describe, step = Checkpoints.describe, Trainer._step

    def commit(self: Any, folder: Path, at: int, state: Mapping[str, Any]) -> None:
        if (rank, attempt, at) == (0, 0, 4):
            # all shares are there, but the checkpoint is not named
            assert len(list(folder.glob("*.safetensors"))) == 4
            os.kill(os.getpid(), signal.SIGKILL)
        describe(self, folder, at, state)

    def taken(self: Any, *given: Any) -> float:
        at = self.progress.step + 1
        if (rank, attempt, at) == (2, 1, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        if (rank, attempt, at) == (3, 2, 6):
            self.watch.beat(at, "reading samples")
            time.sleep(600)
        return step(self, *given)

    Checkpoints.describe, Trainer._step = commit, taken  # type: ignore[method-assign,assignment]
    return main(arguments)


def as_if_killed(run: Path, folder: Path, step: int, of: str = "finetune") -> Path:
    """Return a copy of a run as it was after the checkpoint of a step of a part of the recipe."""
    shutil.copytree(run, folder, symlinks=True)
    (made,) = folder.glob(f"0?-{of}")
    for name in ("artifact.json", "model"):
        path = made / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (made / "checkpoints").iterdir():
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    return folder


@pytest.mark.slow
def test_a_run_goes_on_after_faults_and_with_other_numbers_of_processes(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    """Four processes to the end; then with faults of all kinds, and so with restarts."""
    sets_ = sets(**GENTLE, **{"steps.finetune.keep": "9", "steps.finetune.timeout": "0.2"})
    arguments = (write_recipe(), *sets_)
    whole = tmp_path / "whole"
    ended = processes.run_ranks(tmp_path, 4, *arguments, "--out", whole)
    assert ended.code == 0, ended.said
    (step,) = whole.glob("0?-finetune")
    assert [path.name for path in sorted((step / "checkpoints").iterdir())] == [
        f"step-{number:06}" for number in (2, 4, 6)
    ]

    faulty = tmp_path / "faulty"
    ended = processes.run_ranks(
        tmp_path, 4, *arguments, "--out", faulty, program=with_faults, restarts=3
    )
    assert ended.code == 0, ended.said
    # killed before the second checkpoint had its name; killed in step 4; hung in step 6
    assert [event["at"] for event in events(faulty, "resumed")] == [2, 2, 4]
    # "does not go on", or "gives no sign of life" where the machine was held up just then
    assert "rank 3, last seen reading samples in step 6," in ended.said, ended.said[-6000:]
    assert losses(faulty)[-2:] == losses(whole)[-2:]
    expected, found = tensors(whole / "model"), tensors(faulty / "model")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    two = as_if_killed(whole, tmp_path / "two", 2)
    ended = processes.run_ranks(tmp_path, 2, *arguments, "--out", two, "--resume")
    assert ended.code == 0, ended.said
    one = as_if_killed(whole, tmp_path / "one", 4)
    assert processes.run(tmp_path, *arguments, "--out", one, "--resume") == 0
    for folder, at in ((two, 2), (one, 4)):
        assert [event["at"] for event in events(folder, "resumed")] == [at]
        assert losses(folder)[6:] == pytest.approx(losses(whole)[at:], abs=5e-6)
        same(whole / "model", folder / "model")
    (made,) = one.glob("0?-finetune")
    assert (made / "checkpoints" / "step-000006" / "state.safetensors").is_file()  # plain, alone
