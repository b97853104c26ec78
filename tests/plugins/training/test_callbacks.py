"""Callbacks of training: when they are called, by the contract, in recipes and when resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from llavakit import Recipe, Registry, Stopped, hookimpl
from llavakit.engine.runner import run
from llavakit.testing import small_recipe
from llavakit_plugins.training.callbacks import Callback, Training
from llavakit_plugins.training.norms import Norms, NormsOptions
from llavakit_plugins.training.testing import CallbackContract


class TestNorms(CallbackContract):
    def build(self) -> Callback:
        return Norms(NormsOptions())


class Log(Callback):
    """Notes when it is called, and halves the connector's weights at the end."""

    name = "log"
    told: ClassVar[list[Any]] = []
    stop_at: ClassVar[int] = -1

    def begin(self, training: Training) -> None:
        self.told.append(("begin", training.step, training.steps))

    def on_step(self, training: Training) -> None:
        self.told.append(training.step)
        if training.step == self.stop_at:
            raise Stopped

    @torch.no_grad()
    def end(self, training: Training) -> None:
        for parameter in training.model.connector.parameters():
            parameter.zero_()
        self.told.append("end")


class Plugin:
    @hookimpl
    def llava_callbacks(self) -> list[type[Callback]]:
        return [Log]


def train(folder: Path, *, resume: bool = False) -> Path:
    base = folder / "small" / "small.toml"
    if not base.exists():
        small_recipe(folder / "small")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"""base = '{base.as_posix()}'
[steps.pretrain]
callbacks = ["log", {{ use = "norms", every = 2 }}]
epochs = 3
max_steps = 3
checkpoint_every = 1
[steps.finetune]
skip = true
[steps.evaluate]
skip = true
""".replace('"log"', '{ use = "log" }')
    )
    registry = Registry.installed()
    registry.register(Plugin(), name="mine")
    run(Recipe.load(recipe, registry, inputs=True), registry, folder / "run", resume=resume)
    return folder / "run"


def test_they_are_called_after_each_step_and_what_they_change_at_the_end_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Log, "told", [])
    folder = train(tmp_path)
    assert Log.told == [("begin", 0, 3), 1, 2, 3, "end"]
    saved = load_file(folder / "01-pretrain" / "model" / "connector.safetensors")
    assert not any(tensor.any() for tensor in saved.values())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    norms = [event for event in events if event["event"] == "norms"]
    assert [event["at"] for event in norms] == [0, 2, 3]
    assert all(set(event) >= {"connector"} and "language" not in event for event in norms)
    assert norms[0]["connector"] != norms[1]["connector"] > 0
    assert norms[-1]["connector"] > 0  # `end` comes behind every `on_step`


def test_a_resumed_training_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Log, "told", [])
    monkeypatch.setattr(Log, "stop_at", 2)
    with pytest.raises(Stopped):
        train(tmp_path)
    monkeypatch.setattr(Log, "stop_at", -1)
    train(tmp_path, resume=True)
    assert Log.told == [("begin", 0, 3), 1, 2, ("begin", 1, 3), 2, 3, "end"]
