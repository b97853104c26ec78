"""Every recipe that comes with llavakit: it validates, plans offline, says what it lacks, and runs.

A run has tiny random weights of the same families, tiny data, and all else as the recipe says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command

import llavakit
from llavakit import Recipe, Registry
from llavakit.engine.plan import Plan, make_plan
from llavakit.recipe.recipe import find_recipe, recipe_folder

TRAINING = {"pretrain", "finetune"}
NAMES = [
    file.stem
    for file in sorted(recipe_folder().glob("*.toml"))
    if not file.stem.startswith("tiny")
    and TRAINING & {use.use for use in Recipe.load(file, Registry.installed()).steps}
]
"""The recipes that train; `evaluate` and `instruct158k` have tests of their own."""


def load(name: str, *overrides: str) -> Recipe:
    return Recipe.load(find_recipe(name), Registry.installed(), overrides)


TASK = ("finetune-task", "finetune-task-lora")
"""Those that start from a published model, and have none of their own."""
QUANTIZED = ("llava7b-qlora",)
WHOLE = {"llava-next-7b": 1, "llava-onevision-0.5b": 3}
"""Those of which every part learns behind the first stage, and in how many stages."""


def plan(name: str, *overrides: str) -> Plan:
    return make_plan(load(name, *overrides), Registry.installed())


def small(
    recipe: Recipe, weights: Mapping[str, Path], data: Path, pretrain: Path, science: Path
) -> list[str]:
    """Return the overrides that make a recipe tiny: its weights, its data, its batches."""
    model = recipe.model
    changes: dict[str, Any] = {"device": "cpu"}
    parts = (("vision", model.vision), ("language", model.language)) if model else ()
    for part, use in parts:
        wide = part == "language" and recipe.name in QUANTIZED
        changes[f"model.{part}.source"] = weights["wide" if wide else use.use]
        changes[f"model.{part}.dtype"] = "float32"
        changes["model.language.max_length"] = 250
    for number, step in enumerate(recipe.steps, start=1):
        key, options = f"steps.{number}", step.options
        if recipe.name in TASK:
            changes[f"{key}.init"] = weights["whole"]
        if step.use in ("pretrain", "finetune"):
            changes |= {
                f"{key}.batch_size": 8, f"{key}.micro_batch_tokens": 300, f"{key}.workers": 0,
                f"{key}.max_length": 250, f"{key}.max_steps": 3,
            }  # fmt: skip
            file = pretrain if step.use == "pretrain" else data / "train.json"
            changes |= _files(f"{key}.data", options["data"], file, data, science)
        for place, benchmark in enumerate(options.get("benchmarks", ()), start=1):
            place_key = f"{key}.benchmarks.{place}"
            changes |= _files(place_key, benchmark, data / "train.json", data, science)
            changes[f"{key}.max_new_tokens"] = 4
    return [
        f"{key}={json.dumps(str(v)) if isinstance(v, Path) else v}" for key, v in changes.items()
    ]


def _files(
    key: str, use: Mapping[str, Any], file: Path, data: Path, science: Path
) -> dict[str, object]:
    if use["use"] == "scienceqa":
        return {f"{key}.problems": science / "problems.json"}
    if use["use"] == "mix":
        parts = enumerate(use["parts"], start=1)
        named = (_files(f"{key}.parts.{n}", part, file, data, science) for n, part in parts)
        return {name: value for files in named for name, value in files.items()}
    return {f"{key}.path": file, f"{key}.images": data / "images"}


@pytest.mark.parametrize("name", NAMES)
def test_it_plans_without_network_or_weights(name: str) -> None:
    made = plan(name)
    assert made.tflops is not None
    assert made.tflops > 0
    room = made.machine.memory_gb
    assert room
    trained = [step for step in made.steps.values() if step.trained]
    stages = [("connector",), ("connector", "language")]
    if name in WHOLE:  # their encoder learns, too
        stages[1:] = [("vision", *stages[1])] * WHOLE[name]
    assert [step.trained for step in trained] == stages[name in TASK :]
    for step in trained:
        assert step.samples
        assert step.tflop
        assert step.memory_gb
        assert step.memory_gb < room, "it does not fit the recipe's own machine"


@pytest.mark.parametrize("name", NAMES)
def test_without_weights_and_data_it_says_how_to_get_them(
    name: str,
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = refused(name)
    recipe = load(name)
    model = recipe.model
    named = [use.options["source"] for use in (model.vision, model.language)] if model else []
    named += [step.options["init"] for step in recipe.steps if step.options.get("init")]
    for source in named:
        if not source.startswith("@"):
            assert f"fetch them with `hf download {source}`" in text
    for _, step in recipe.active_steps():
        if "data" in step.options:
            data = step.options["data"]
            for part in data.get("parts", [data]):
                assert f"{part.get('path') or part['problems']} does not exist" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_with_tiny_weights(
    name: str,
    llava_run: Command,
    weights: Mapping[str, Path],
    data: Path,
    pretrain: Path,
    science: Path,
    tmp_path: Path,
) -> None:
    recipe = load(name)
    changes = [
        part
        for change in small(recipe, weights, data, pretrain, science)
        for part in ("--set", change)
    ]
    done = llava_run(name, *changes, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    seen: list[int] = []
    for number, (folder, _) in enumerate(recipe.active_steps(), start=1):
        artifact = json.loads((tmp_path / "run" / folder / "artifact.json").read_text())
        if "steps" in artifact["metrics"]:
            seen.append(number)
            assert artifact["metrics"]["steps"] == 3
            assert 0 < artifact["metrics"]["loss"] < 20
    steps = enumerate(recipe.steps, start=1)
    assert seen == [number for number, step in steps if step.use in TRAINING]
    model = llavakit.load(tmp_path / "run" / "model", device="cpu")
    image = data / "images" / "0.png"
    assert model.generate_ids("what colour is it ?", images=[image], max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "pixels", "text", "stage", "tflop"),
    [
        # ../shared/PERFORMANCE.md: necessary TFLOP a sample
        ("llava13b", 224, 22, 0, 14.1),
        ("llava13b", 224, 298, 1, 42.4),
        ("llava7b", 224, 22, 0, 7.25),
        ("llava7b", 224, 298, 1, 21.7),
        ("llava-v1.5-13b", 336, 22, 0, 30.7),
        ("llava-v1.5-7b", 336, 298, 1, 34.5),
    ],
)
def test_plans_reckon_with_the_necessary_work(
    name: str, pixels: int, text: int, stage: int, tflop: float
) -> None:
    step = list(plan(name).steps.values())[stage]
    assert step.samples is not None
    assert step.tokens == step.samples * ((pixels // 14) ** 2 + text)
    assert step.tflop is not None
    assert step.tflop / step.samples == pytest.approx(tflop, rel=0.05)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        # steps of the original's runs: batches of 128 and 32; 256 and 128
        ("llava13b", (4652, 14787)),
        ("llava7b", (4652, 14787)),
        ("llava13b-paper", (4652, 14787)),
        ("llava7b-lora", (4652, 625)),  # 80K in batches of 128
        ("llava7b-qlora", (4652, 625)),
        ("llava-v1.5-13b", (2181, 5198)),
        ("llava-v1.5-7b", (2181, 5198)),
    ],
)
def test_plans_have_the_original_number_of_steps(name: str, steps: tuple[int, int]) -> None:
    assert tuple(step.steps for step in plan(name).steps.values()) == steps


def test_a_step_may_prepare_its_images_in_another_way(
    llava_run: Command,
    weights: Mapping[str, Path],
    data: Path,
    pretrain: Path,
    science: Path,
    tmp_path: Path,
) -> None:
    """Stage 1 of v1.5 cuts its images while the model pads them."""
    base = small(load("llava-v1.5-7b"), weights, data, pretrain, science)

    def losses(name: str, *changes: str) -> list[float]:
        overrides = [*base, "steps.2.skip=true", "steps.1.log_every=1", *changes]
        arguments = [part for change in overrides for part in ("--set", change)]
        done = llava_run("llava-v1.5-7b", *arguments, "--out", tmp_path / name)
        assert done.code == 0, done.err
        lines = (tmp_path / name / "events.jsonl").read_text().splitlines()
        return [event["loss"] for event in map(json.loads, lines) if event["event"] == "train"]

    as_it_is = losses("a")
    cut = losses("b", "model.vision.aspect=crop", "steps.1.prepare={}")
    padded = losses("c", "steps.1.prepare={}")
    assert len(as_it_is) == 3
    assert as_it_is == cut != padded
    for cached in ("true", "false"):
        assert losses(cached, f"steps.1.cache_features={cached}") == pytest.approx(cut, abs=1e-4)


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        ('{ aspekt = "crop" }', "`prepare` of `clip`: `aspekt`"),
        ('{ aspect = "stretch it" }', "`prepare` of `clip`: `aspect`"),
        ("{ config = { image_size = 112 } }", "`prepare` changes the size of images to 112"),
    ],
)
def test_what_prepare_cannot_be_is_said_by_the_plan(
    refused: Callable[..., str],
    prepare: str,
    sentence: str,
) -> None:
    assert sentence in refused("llava7b", "--plan", "--set", f"steps.pretrain.prepare={prepare}")
