"""Training with tilings: cached and encoded views, a step's own tiling, the row that is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Command

from llavakit import Recipe, Registry
from llavakit.model.folder import create_model

TILED = ('connector = { use = "mlp" }', 'connector = { use = "mlp" }\ntiling = { use = "anyres" }')


def losses(folder: Path, step: str) -> list[float]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "train"]
    return [event["loss"] for event in events if event["step"].endswith(step)]


def train(llava_run: Command, recipe: Path, out: Path, *changes: str) -> Path:
    settings = ("steps.pretrain.log_every=1", "steps.finetune.log_every=1", *changes)
    done = llava_run(recipe, "--out", out, *(w for c in settings for w in ("--set", c)))
    assert done.code == 0, done.err
    return out


def test_cached_views_teach_what_encoded_ones_do(
    write_recipe: Callable[..., Path], llava_run: Command, tmp_path: Path
) -> None:
    recipe = write_recipe(TILED)
    found = {}
    for cached in ("true", "false"):
        changes = [f"steps.{step}.cache_features={cached}" for step in ("pretrain", "finetune")]
        out = train(llava_run, recipe, tmp_path / cached, *changes)
        found[cached] = [losses(out, step) for step in ("pretrain", "finetune")]
    for one, other in zip(found["true"], found["false"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    registry = Registry.installed()
    made = create_model(Recipe.load(recipe, registry).model, registry, seed=0)
    assert made.image_newline is not None
    learned: Any = load_file(tmp_path / "true" / "model" / "tiling.safetensors")["image_newline"]
    assert not torch.equal(learned, made.image_newline)


def test_a_step_may_have_a_tiling_of_its_own(
    write_recipe: Callable[..., Path], llava_run: Command, refused: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(TILED)
    own = ("steps.pretrain.tiling={use='single'}", "steps.finetune.skip=true")
    out = train(llava_run, recipe, tmp_path / "tiled", *own)
    plain = train(llava_run, write_recipe(name="plain.toml"), tmp_path / "plain", own[1])
    assert losses(out, "pretrain") == losses(plain, "pretrain")  # the same bits
    weights = [folder / "01-pretrain/model/connector.safetensors" for folder in (out, plain)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # what is left is the model of the recipe, its tiling included
    assert "anyres" in (out / "01-pretrain/model/model.toml").read_text()
    said = refused(write_recipe(name="plain.toml"), "--plan", "--set",
                   "steps.finetune.tiling={use='anyres'}")  # fmt: skip
    assert "asks for a learned row between lines" in said
