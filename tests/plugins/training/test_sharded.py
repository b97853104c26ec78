"""Weights divided among the devices of torchrun, against one process that holds them all."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import LANGUAGE, RecipeWriter
from tests.core import processes
from tests.core.engine.test_distributed import llava_run
from torch import Tensor


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events(run, "train")]


def tensors(model: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(model)}:{name}": tensor
        for file in sorted(model.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(one: Path, other: Path, atol: float = 3e-6) -> None:
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=name)


def sets(**options: str) -> list[str]:
    return [part for key, value in options.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.slow
def test_all_that_learns_or_is_large_is_divided(
    write_recipe: RecipeWriter, tmp_path: Path, data: Path
) -> None:
    """A frozen language model, then adapters and an encoder that learn, in 2 groups of 2.

    With 2 samples a step there are steps without an image and processes without a sample.
    """
    pytest.importorskip("peft")
    lora = 'use = "vicuna"\nlora = { rank = 4, alpha = 8, dropout = 0 }'
    recipe = write_recipe(('use = "vicuna"', lora))
    held_out = f'{{ use = "conversations", path = "{data}/train.json", images = "{data}/images" }}'
    small = {
        "steps.finetune.train": "{ vision = 1e-4, connector = 1e-4, language = 1e-4 }",
        "steps.finetune.batch_size": "2",
        "steps.finetune.max_steps": "14",
        "steps.finetune.held_out": held_out,
        "steps.finetune.validate_every": "7",
        "steps.finetune.keep_best": "true",
        "steps.finetune.weight_decay": "0.1",
    }
    one, four = tmp_path / "one", tmp_path / "four"
    assert processes.run(tmp_path, recipe, *sets(**small), "--out", one) == 0
    small["steps.pretrain.shard"] = "true"
    small["steps.finetune.parallel"] = "{ replicate = 2 }"
    run = llava_run(4, recipe, *sets(**small), "--out", four)
    assert run.returncode == 0, run.stderr
    assert losses(four) == pytest.approx(losses(one), abs=5e-6)
    for mine, theirs in zip(events(four, "validation"), events(one, "validation"), strict=True):
        assert mine["held_out_loss"] == pytest.approx(theirs["held_out_loss"], abs=2e-6)
        assert mine["answers"] == theirs["answers"]
    for model in ("01-pretrain/model", "02-finetune/best", "02-finetune/last"):
        same(one / model, four / model)


def test_what_cannot_be_divided_is_said(
    write_recipe: RecipeWriter, refused: Callable[..., str]
) -> None:
    uneven = sets(**{"steps.finetune.parallel": "{ replicate = 3, shard = 2 }"})
    text = refused(write_recipe(), "--plan", *uneven, "--set", "machine.devices=8")
    assert "`parallel = { replicate = 3, shard = 2 }` does not make up 8 devices" in text
    both = sets(**{"steps.finetune.parallel": "{}", "steps.finetune.shard": "false"})
    assert "state one" in refused(write_recipe(), "--plan", *both)
    four = sets(**{"steps.finetune.shard": "true", "machine.devices": "2"})
    small = ('use = "vicuna"', 'use = "vicuna"\nquantize = "nf4"\nlora = {}')
    assert "weights of 4 bits" in refused(write_recipe(small), "--plan", *four)


GENTLE = {
    "steps.1.skip": "true",
    "steps.finetune.train": "{ connector = 1e-4, language = 1e-4 }",
}
FAULTS = """\
import os, signal, sys, time
from llavakit.cli import main
from llavakit_plugins.training.checkpoints import Checkpoints
from llavakit_plugins.training.loop import Trainer

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
describe, step = Checkpoints.describe, Trainer._step

def commit(self, folder, at, state):
    if (rank, attempt, at) == (0, 0, 4):
        assert len(list(folder.glob("*.safetensors"))) == 4  # all are there but it is not named
        os.kill(os.getpid(), signal.SIGKILL)
    describe(self, folder, at, state)

def taken(self, *arguments):
    at = self.progress.step + 1
    if (rank, attempt, at) == (2, 1, 4):
        os.kill(os.getpid(), signal.SIGKILL)
    if (rank, attempt, at) == (3, 2, 6):
        self.watch.beat(at, "reading samples")
        time.sleep(600)
    return step(self, *arguments)

Checkpoints.describe, Trainer._step = commit, taken
sys.exit(main(sys.argv[1:]))
"""


def as_if_killed(run: Path, folder: Path, step: int) -> Path:
    """Return a copy of a run as it was after the checkpoint of a step."""
    shutil.copytree(run, folder, symlinks=True)
    (made,) = folder.glob("0?-finetune")
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
    """Four processes to the end; then with faults of all kinds, where torchrun restarts them."""
    sets_ = sets(**GENTLE, **{"steps.finetune.keep": "9", "steps.finetune.timeout": "0.2"})
    arguments = (write_recipe(), *sets_)
    whole = tmp_path / "whole"
    run = llava_run(4, *arguments, "--out", whole)
    assert run.returncode == 0, run.stderr
    (step,) = whole.glob("0?-finetune")
    assert [path.name for path in sorted((step / "checkpoints").iterdir())] == [
        f"step-{number:06}" for number in (2, 4, 6)
    ]

    program = tmp_path / "faulty.py"
    program.write_text(FAULTS)
    faulty = tmp_path / "faulty"
    run = llava_run(4, *arguments, "--out", faulty, program=program, restarts=3)
    assert run.returncode == 0, run.stderr
    # killed before the second checkpoint had its name; killed in step 4; hung in step 6
    assert [event["at"] for event in events(faulty, "resumed")] == [2, 2, 4]
    assert "rank 3, last seen reading samples in step 6, does not go on" in run.stderr
    assert losses(faulty)[-2:] == losses(whole)[-2:]
    expected, found = tensors(whole / "model"), tensors(faulty / "model")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    two = as_if_killed(whole, tmp_path / "two", 2)
    run = llava_run(2, *arguments, "--out", two, "--resume")
    assert run.returncode == 0, run.stderr
    one = as_if_killed(whole, tmp_path / "one", 4)
    assert processes.run(tmp_path, *arguments, "--out", one, "--resume") == 0
    for folder, at in ((two, 2), (one, 4)):
        assert [event["at"] for event in events(folder, "resumed")] == [at]
        assert losses(folder)[6:] == pytest.approx(losses(whole)[at:], abs=5e-6)
        same(whole / "model", folder / "model")
    (made,) = one.glob("0?-finetune")
    assert (made / "checkpoints" / "step-000006" / "state.safetensors").is_file()  # plain, alone


MEMORY = """\
import gc, json, sys, threading, time
from pathlib import Path
import torch
import llavakit
from llavakit_plugins.training.torchrun import join
from llavakit_plugins.training.checkpoints import write_whole
from llavakit_plugins.training.parallel import shard

def own():  # what is mapped from a file is shared by all, and given back when it is needed
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

def peak(work, before):
    most, ended = [0], threading.Event()
    def look():
        while not ended.wait(0.002):
            most[0] = max(most[0], own() - before)
    looking = threading.Thread(target=look)
    looking.start()
    result = work()
    ended.set()
    looking.join()
    return result, max(most[0], own() - before)

def load_without_weights(path):
    import transformers.models.llama.modeling_llama, transformers.models.clip.modeling_clip
    import torch.distributed.fsdp, torch._dynamo
    torch.zeros(8, requires_grad=True).sum().backward()

def divided(parts):
    model = llavakit.load(sys.argv[1], device="cpu").requires_grad_(True)
    shard(model, group, torch.device("cpu"), parts, half=False, encoder=False)
    return model

with join("cpu") as (group, _):
    load_without_weights(sys.argv[1])  # libraries' own memory
    at_first, found = own(), {}
    for parts in (4, 2):
        model, found[f"read in {parts}"] = peak(lambda: divided(parts), at_first)
        weights = dict(model.language.named_parameters())
        path = Path(sys.argv[2]) / f"{parts}.safetensors" if group.is_main else None
        held = own()
        _, found[f"written from {parts}"] = peak(lambda: write_whole(weights, path), held)
        del model, weights
        gc.collect()
    (Path(sys.argv[2]) / f"{group.rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a process holds")
def test_no_process_holds_a_whole_copy_of_what_is_divided(
    write_recipe: RecipeWriter, tmp_path: Path, backbones: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from llavakit import Recipe, Registry, save_model
    from llavakit.model.folder import create_model

    shape = {**LANGUAGE, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10}
    large = tmp_path / "large"
    shutil.copytree(backbones / "language", large)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(large)
    recipe = Recipe.load(write_recipe((f"{backbones}/language", str(large))), Registry.installed())
    made = create_model(recipe.model, Registry.installed(), seed=0)
    save_model(made, tmp_path / "model")
    total = sum(p.numel() * p.element_size() for p in made.language.parameters())
    block = sum(p.numel() * p.element_size() for p in made.language.blocks[0].parameters())
    program = tmp_path / "memory.py"
    program.write_text(MEMORY)
    run = llava_run(4, tmp_path / "model", tmp_path, program=program)
    assert run.returncode == 0, run.stderr
    for rank in range(4):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for parts in (2, 4):
            assert found[f"read in {parts}"] < total / parts + 3 * block, (rank, found, total)
            assert found[f"written from {parts}"] < 4 * block, (rank, found, total)
    for parts in (2, 4):  # and it is the same model that arrives
        written = load_file(tmp_path / f"{parts}.safetensors")
        for name, weight in made.language.named_parameters():
            assert torch.equal(written[name], weight), name
