"""Several processes under torchrun arrive where one does, whole or divided among them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import RecipeWriter
from tests.core import processes
from torch import Tensor

from llavakit_plugins.training.parallel import deal

KILLED: dict[str, Any] = {"kill_at": 13, "below": "02-finetune"}
"""The write that a run dies before: one between two checkpoints of stage 2."""
GENTLE = ("--set", "steps.finetune.train={ connector = 1e-4, language = 1e-4 }")


def llava_run(
    processes: int, *arguments: object, program: Path | None = None, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run the command, or a program in its place, in so many processes of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--max-restarts", str(restarts), "--nproc-per-node", str(processes)]
    command = program or Path(sys.executable).with_name("llava-run")
    own = [*launcher, str(command), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        own, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def outcome(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    weights = load_file(folder / "model" / "connector.safetensors")
    weights |= load_file(folder / "model" / "language" / "model.safetensors")
    return [line["loss"] for line in lines if line["event"] == "train"], weights


def test_several_processes_arrive_where_one_does(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    """24 samples, some without an image: with whole weights on both, then with divided ones."""
    arguments = (write_recipe(), *GENTLE)
    assert processes.run(tmp_path, *arguments, "--out", tmp_path / "one") == 0
    losses, weights = outcome(tmp_path / "one")

    whole = ("--set", "steps.finetune.shard=false")
    first = llava_run(2, *arguments, *whole, "--out", tmp_path / "whole")

    # stage 2 divides the weights by default; one process began it and was killed
    divided = (*arguments, "--out", tmp_path / "divided")
    assert processes.run(tmp_path, *divided, **KILLED) == -signal.SIGKILL
    assert "02-finetune" in {folder.name for folder in (tmp_path / "divided").iterdir()}
    second = llava_run(2, *divided, "--resume")

    for together, folder in ((first, "whole"), (second, "divided")):
        assert together.returncode == 0, together.stderr
        assert together.stdout.count("small: done") == 1
        found, supervised = outcome(tmp_path / folder)
        assert found[-3:] == pytest.approx(losses[-3:], abs=2e-6)
        assert supervised.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(supervised[name], weight, atol=3e-6, rtol=0)


def test_adapters_learn_in_a_team_as_in_one_process(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    lora = 'use = "vicuna"\nlora = { rank = 4, alpha = 8, dropout = 0 }'
    arguments = (write_recipe(('use = "vicuna"', lora)), *GENTLE)
    found = []
    assert processes.run(tmp_path, *arguments, "--out", tmp_path / "one") == 0
    run = llava_run(2, *arguments, "--out", tmp_path / "two")
    assert run.returncode == 0, run.stderr
    for name in ("one", "two"):
        losses, weights = outcome(tmp_path / name)
        adapter = tmp_path / name / "model" / "language" / "adapter" / "adapter_model.safetensors"
        found.append((losses, weights, load_file(adapter)))
    (losses, weights, supervised), (losses_2, weights_2, learned_2) = found
    assert losses_2[-3:] == pytest.approx(losses[-3:], abs=2e-6)
    assert any(
        value.any() for name, value in supervised.items() if "lora_B" in name
    )  # zero at first
    for one, two in ((weights, weights_2), (supervised, learned_2)):
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=3e-6, rtol=0)


def test_a_mistake_is_said_once(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    sets = ("--set", "steps.finetune.data.path=nowhere.json")
    run = llava_run(2, write_recipe(), "--out", tmp_path / "run", *sets)
    assert run.returncode != 0
    assert run.stderr.count("error: ") == 1


PROGRAM = """\
import atexit, builtins, json, os, sys, threading
import psutil
from llavakit.cli import main

out, bug = sys.argv[1:3]
leave = os._exit

def look(code):  # at what the process still holds when it leaves
    own = psutil.Process()
    left = [thread.name for thread in threading.enumerate() if not thread.daemon]
    left += [" ".join(child.cmdline()) for child in own.children()]
    left += [file.path for file in own.open_files() if file.path.startswith(out)]
    print("left:", json.dumps(left), flush=True)
    leave(code)

def fail(*_, **__):
    raise RuntimeError("planted")

os._exit = look
atexit.register(os.abort)  # as a thread of the process group may, while the interpreter finalises
if bug == "bug":
    builtins.print, print = fail, print
sys.argv[1:] = sys.argv[3:]
print("begun")
sys.exit(main())
"""
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def run_to_the_end(
    folder: Path, *arguments: object, bug: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as the program itself, with an interpreter whose own end aborts."""
    own = [sys.executable, "-c", PROGRAM, str(folder), bug, *map(str, arguments)]
    return subprocess.run(
        own, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def test_a_process_of_torchrun_leaves_without_the_interpreters_own_end(tmp_path: Path) -> None:
    assert run_to_the_end(tmp_path, "recipes").returncode == -signal.SIGABRT
    for arguments, bug, code, said in (
        (["recipes"], "", 0, ""),
        (["export", "nowhere", "out", "--format", "hf"], "", 2, "error: "),
        (["recipes"], "bug", 1, "RuntimeError: planted"),
    ):
        run = run_to_the_end(tmp_path, *arguments, bug=bug, **ALONE)
        assert run.returncode == code, run.stderr
        assert run.stdout.startswith("begun")
        assert 'left: ["MainThread"]' in run.stdout
        assert said in run.stderr
        assert ("Traceback" in run.stderr) == (code == 1)


def test_a_run_has_closed_everything_when_its_process_leaves(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    free = socket.create_server(("127.0.0.1", 0))  # closed, so that the process group takes it
    port = str(free.getsockname()[1])
    free.close()
    run = run_to_the_end(folder, write_recipe(), "--out", folder, **ALONE, MASTER_PORT=port)
    assert run.returncode == 0, run.stderr
    assert "small: done" in run.stdout
    assert 'left: ["MainThread"]' in run.stdout


def test_samples_are_dealt_so_that_hands_are_of_like_length() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 600, (128,), generator=draw).tolist()
    hands = deal(lengths, 8)
    assert sorted(index for hand in hands for index in hand) == list(range(128))
    totals = [sum(lengths[index] for index in hand) for hand in hands]
    assert max(totals) - min(totals) < 0.02 * max(totals)
    assert deal([5], 3) == [[0], [], []]
