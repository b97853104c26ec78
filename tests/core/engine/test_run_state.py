"""The files of a run's state, damaged in any way: the run goes on, or one sentence says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from llavakit import LlavaError, Recipe, Registry, TrainingError
from llavakit.engine.runner import run
from llavakit_plugins.commands.reuse import finished_in
from llavakit_plugins.training.checkpoints import Best, Checkpoints
from llavakit_plugins.training.progress import Progress

FUZZ = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
REGISTRY = Registry.installed()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


def places_in(node: Any, key: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(node, dict | list):
        return [key]
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return [key, *(place for name, item in items for place in places_in(item, (*key, name)))]


def changed(data: st.DataObject, table: Any) -> Any:
    """Return JSON with another value at one place."""
    value = data.draw(JSON)
    key = data.draw(st.sampled_from(places_in(table)))
    if not key:
        return value
    whole = json.loads(json.dumps(table))
    node = whole
    for part in key[:-1]:
        node = node[part]
    node[key[-1]] = value
    return whole


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    state = Progress(3, 1, 1, 24, 300, 90, [(3, 0.5)], [(0, 0.7, ["a red circle"])])
    Checkpoints(folder, keep=1).save(3, {"parameter/w": torch.arange(4.0)}, vars(state))
    Best(folder).save(3, {"w": torch.arange(4.0)})
    return folder


@FUZZ
@given(st.data())
def test_any_other_state_is_damage(saved: Path, data: st.DataObject) -> None:
    file = saved / "step-000003" / "state.json"
    before = file.read_text()
    found = changed(data, json.loads(before))
    assume(found != json.loads(before))
    file.write_text(json.dumps(found))
    try:
        with pytest.raises(TrainingError, match="step-000003 is damaged"):
            Checkpoints(saved, keep=1).load(Progress)
    finally:
        file.write_text(before)


@FUZZ
@given(st.sampled_from(["step", "best"]), st.integers(0, 10**6), st.binary(max_size=9))
def test_any_other_bytes_are_damage(saved: Path, kind: str, at: int, found: bytes) -> None:
    name = f"{kind}-000003"
    file = saved / name / "state.safetensors"
    before = file.read_bytes()
    at %= len(before)
    after = before[:at] + found + before[at + 1 :]
    assume(after != before)
    file.write_bytes(after)
    try:
        with pytest.raises(TrainingError, match=rf"{name}.*\bis damaged"):
            Checkpoints(saved, keep=1).load(Progress) if kind == "step" else Best(saved).recall(3)
    finally:
        file.write_bytes(before)


def test_what_was_saved_comes_back(saved: Path) -> None:
    found = Checkpoints(saved, keep=1).load(Progress)
    assert found is not None
    tensors, state = found
    assert tensors["parameter/w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert state == Progress(3, 1, 1, 24, 300, 90, [(3, 0.5)], [(0, 0.7, ["a red circle"])])
    assert Best(saved).recall(3)["w"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_only_folders_of_ours_are_dropped(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    others = ["step-000001-bak", "step-x", "best-000001-bak", "best-"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "best-000007").write_text("a file")
    for step in (1, 2, 3):
        kept.save(step, {"w": torch.ones(2)}, {})
        Best(tmp_path).save(step, {"w": torch.ones(2)})
        Best(tmp_path).drop_all_but(step)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "best-000007", "step-000003", "best-000003"}


# -- records and events ----------------------------------------------------------------------------

FILES = [
    "01-scenes/begun.json", "01-scenes/artifact.json", "events.jsonl", "environment.json",
    "plan.json", "recipe.toml", "report.html", "model",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "r.toml"
    path.write_text('[[steps]]\nuse = "scenes"\ntrain = 8\nsingle = 8\ntest = 8\n')
    recipe = Recipe.load(path, REGISTRY)
    run(recipe, REGISTRY, folder / "run")
    return recipe, folder


@settings(FUZZ, max_examples=25)
@given(st.data(), st.sampled_from(FILES), st.booleans(), st.booleans())
def test_a_run_goes_on_or_says_why_not(
    finished: tuple[Recipe, Path], data: st.DataObject, name: str, done: bool, resume: bool
) -> None:
    recipe, folder = finished
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "run", copy, symlinks=True)
    if not done:
        (copy / "01-scenes" / "artifact.json").unlink()
    file = copy / name
    if name.endswith(".json") and file.is_file() and data.draw(st.booleans()):
        file.write_text(json.dumps(changed(data, json.loads(file.read_text()))))
    elif data.draw(st.booleans()):
        file.write_bytes(data.draw(st.binary(max_size=40)))
    else:
        file.unlink(missing_ok=True)
        file.mkdir()
    refusal = ""
    try:
        run(recipe, REGISTRY, copy, resume=resume)
    except LlavaError as error:
        refusal = str(error)
    if refusal:
        assert name in refusal
        return
    assert (copy / "01-scenes" / "artifact.json").is_file()
    assert (copy / "01-scenes" / "train.jsonl").is_file()


@settings(FUZZ, max_examples=20)
@given(st.sampled_from(["01-scenes/artifact.json", "environment.json"]), st.data())
def test_reuse_takes_what_is_whole_and_does_the_rest(
    finished: tuple[Recipe, Path], name: str, data: st.DataObject
) -> None:
    recipe, folder = finished
    other, out = folder / "other", folder / "out"
    for place in (other, out):
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "run", other, symlinks=True)
    file = other / name
    file.write_text(json.dumps(changed(data, json.loads(file.read_text()))))
    assert run(recipe, REGISTRY, out, reuse=finished_in([other])) is not None
    assert (out / "01-scenes" / "artifact.json").is_file()
