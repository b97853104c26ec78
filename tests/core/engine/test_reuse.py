"""Steps that another run has finished are taken over, where they are the same and untouched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Command, RecipeWriter


@pytest.fixture
def first(write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path) -> Path:
    """A finished run in `runs/first`."""
    out = tmp_path / "runs" / "first"
    code, _, err = llava_run(write_recipe(), "--out", out)
    assert code == 0, err
    return out


def weights(run: Path) -> dict[str, bytes]:
    files = (run / "model").rglob("*.safetensors")
    return {path.relative_to(run / "model").as_posix(): path.read_bytes() for path in files}


def events(run: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [(line["step"], line["event"]) for line in lines if line["event"] in ("taken", "done")]


def test_what_is_the_same_is_taken_and_the_rest_is_done(
    first: Path, write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    change = ("--set", "steps.finetune.epochs=1")
    shared = tmp_path / "shared"
    code, _, err = llava_run(write_recipe(), "--out", shared, "--reuse", first.parent, *change)
    assert code == 0, err
    assert f"01-pretrain: taken from {first / '01-pretrain'}" in err
    assert events(shared) == [("01-pretrain", "taken"), ("02-finetune", "done")]
    alone = tmp_path / "alone"
    assert llava_run(write_recipe(), "--out", alone, *change).code == 0
    assert weights(shared) == weights(alone)
    assert weights(shared) != weights(first)
    assert "01-pretrain" in (shared / "report.html").read_text()
    file = Path("01-pretrain/model/connector.safetensors")
    assert os.path.samefile(first / file, shared / file)  # linked: it takes no room
    # a second time it is simply done
    again = llava_run(write_recipe(), "--out", shared, "--reuse", first, *change)
    assert "01-pretrain: done before" in again.err


def test_everything_the_same_is_taken_whole(
    first: Path, write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    code, _, err = llava_run(write_recipe(), "--out", tmp_path / "copy", "--reuse", first)
    assert code == 0, err
    assert weights(tmp_path / "copy") == weights(first)
    assert [event for _, event in events(tmp_path / "copy")] == ["taken", "taken"]


@pytest.mark.parametrize("change", ["seed=1", "model.connector.bias=false"])
def test_another_seed_or_model_is_not_the_same(
    first: Path, write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, change: str
) -> None:
    if change != "seed=1":
        change = 'model.connector={ use = "linear" }'
    setting = ("--set", change, "--set", "steps.2.skip=true")
    code, _, err = llava_run(write_recipe(), "--out", tmp_path / "x", "--reuse", first, *setting)
    assert code == 0, err
    assert events(tmp_path / "x") == [("01-pretrain", "done")]
    differs = "seed" if change == "seed=1" else "model.connector.use"
    assert f"01-pretrain: not taken: {first / '01-pretrain'} differs in {differs}\n" in err


def test_why_a_step_is_not_taken_is_said(
    first: Path, write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    pretrain = tmp_path / "pretrain.json"
    sets = ("--set", "steps.2.skip=true", "--set", "steps.pretrain.batch_size=4")
    recipe = write_recipe()
    pretrain.write_text(pretrain.read_text() + "\n")
    _, _, err = llava_run(recipe, "--out", tmp_path / "x", "--reuse", first, *sets)
    said = f"differs in steps.pretrain.batch_size, files.{pretrain}\n"
    assert f"01-pretrain: not taken: {first / '01-pretrain'} {said}" in err
    (first / "01-pretrain" / "artifact.json").unlink()
    _, _, err = llava_run(write_recipe(), "--out", tmp_path / "y", "--reuse", first, *sets)
    assert f"01-pretrain: not taken: {first} did not finish it" in err


@pytest.mark.parametrize(
    "damage",
    [
        {"contents": []}, {"contents": {"a": []}}, {"contents": {"model/connector.safetensors": 3}},
        {"record": []}, {"record": {"steps": {}}}, {"record": {"steps": [1, 2]}}, {"record": None},
        {"packages": []}, {"packages": {"llavakit": {}}},
    ],
)  # fmt: skip
def test_facts_of_other_shapes_are_a_reason_not_to_take_it(
    first: Path, write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, damage: object
) -> None:
    assert isinstance(damage, dict)
    for file in (first / "01-pretrain" / "artifact.json", first / "environment.json"):
        facts = json.loads(file.read_text())
        file.write_text(json.dumps(facts | {k: v for k, v in damage.items() if k in facts}))
    setting = ("--set", "steps.2.skip=true")
    code, _, err = llava_run(write_recipe(), "--out", tmp_path / "x", "--reuse", first, *setting)
    assert code == 0, err
    assert f"01-pretrain: not taken: {first / '01-pretrain'} " in err
    assert events(tmp_path / "x") == [("01-pretrain", "done")]


def test_what_was_changed_since_is_not_taken(
    first: Path, write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    file = first / "01-pretrain" / "model" / "connector.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    setting = ("--set", "steps.2.skip=true")
    code, _, err = llava_run(write_recipe(), "--out", tmp_path / "x", "--reuse", first, *setting)
    assert code == 0, err
    said = f"not taken: {first / '01-pretrain'} was changed since: model/connector.safetensors"
    assert said in err
    assert (tmp_path / "x" / "01-pretrain" / "model" / "connector.safetensors").read_bytes() == data


def test_another_version_s_steps_are_not_taken(
    first: Path, write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    facts = json.loads((first / "environment.json").read_text())
    facts["packages"]["llavakit"] = "0.0.1"
    (first / "environment.json").write_text(json.dumps(facts))
    setting = ("--set", "steps.2.skip=true")
    code, _, err = llava_run(write_recipe(), "--out", tmp_path / "x", "--reuse", first, *setting)
    assert code == 0, err
    assert "was made by llavakit 0.0.1" in err
    assert events(tmp_path / "x") == [("01-pretrain", "done")]


def test_an_unfinished_step_is_not_taken_and_ours_is_set_aside(
    first: Path, write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert llava_run(write_recipe(), "--out", other).code == 0
    (first / "02-finetune" / "artifact.json").unlink()
    (other / "02-finetune" / "artifact.json").unlink()  # as if it had been interrupted
    third = tmp_path / "third"
    _, _, err = llava_run(write_recipe(), "--out", third, "--reuse", first)
    assert events(third) == [("01-pretrain", "taken"), ("02-finetune", "done")], err
    code, _, err = llava_run(write_recipe(), "--out", other, "--reuse", third)
    assert code == 0, err
    assert "02-finetune: taken from" in err
    assert (other / "superseded" / "02-finetune.1").is_dir()
    assert weights(other) == weights(third)


def test_a_folder_without_runs_is_refused(
    write_recipe: RecipeWriter, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent"):
        text = refused(write_recipe(), "--out", tmp_path / "x", "--reuse", folder)
        assert f"{folder} holds no run to take finished steps from" in text
    assert not (tmp_path / "x").exists()
