"""Weights divided among the devices of torchrun, against one process that holds them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import RecipeWriter
from tests.core import processes
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
    ended = processes.run_ranks(tmp_path, 4, recipe, *sets(**small), "--out", four)
    assert ended.code == 0, ended.said
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
