"""A tiny model learns from videos, and is asked about them, from the rows of a file on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Command, RecipeWriter
from tests.made_videos import write_frames, write_video

import llavakit
from llavakit import USUAL, DataError, Dataset, LlavaModel, ModelError, Recipe, Registry, Use, Video
from llavakit.engine.plan import make_plan
from llavakit.model.folder import create_model
from llavakit_plugins.datasets.conversations import Conversations
from llavakit_plugins.datasets.usual_visuals import usual_visuals

TILINGS = {
    "onevision": '{ use = "anyres", grids = [[1, 2]], only_alone = true, video = { frames = 4 } }',
    "next": '{ use = "anyres", grids = [[2, 2]], video = { frames = 3, pool = "average", '
    'pool_features = true, newline = "none" } }',
    "single": '{ use = "single", video = { frames = 4, rate = 5.0, newline = "frame" } }',
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.json` and videos: files where PyAV is there, folders else; and images."""
    folder = tmp_path_factory.mktemp("clips")
    rows: list[dict[str, Any]] = []
    try:
        import av  # noqa: F401

        files = True
    except ImportError:
        files = False
    for number in range(12):
        shade = ((220, 30, 30), (30, 30, 220))[number % 2]
        colour = ("red", "blue")[number % 2]
        frames = [np.full((40, 48, 3), shade, np.uint8) for _ in range(5 + number)]
        name = f"{number}.mp4" if files and number % 3 else f"{number}"
        if name.endswith("mp4"):
            write_video(folder / name, frames)
        else:
            write_frames(folder / name, frames)
        answer = {"from": "gpt", "value": f"it is {colour} ."}
        ask = {"from": "human", "value": "<video>\nwhat colour is it ?"}
        rows.append({"id": f"v{number}", "video": name, "conversations": [ask, answer]})
    # LLaVA-Video's own form, several, and mixed with an image
    rows[1]["conversations"][0]["value"] = "<image>\nwhat colour is it ?"
    write_frames(folder / "photos", [np.full((30, 64, 3), (220, 30, 30), np.uint8)])
    both = "<video> <image>\nwhat colour is it ?"
    rows.append({"id": "mixed", "image": "photos/0.png", "videos": ["2"], "conversations": [
        {"from": "human", "value": both}, {"from": "gpt", "value": "it is red ."}]})  # fmt: skip
    (folder / "2").exists() or write_frames(folder / "2", [np.zeros((40, 48, 3), np.uint8)] * 3)
    parts = [{"type": "video", "video": "0"}, {"type": "image", "image": "photos/0.png"},
             {"type": "text", "text": "what colour is it ?"}]  # fmt: skip
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "it is red ."}]
    rows.append({"id": "messages", "messages": turns})
    text = [{"from": "human", "value": "what colour is it ?"}, {"from": "gpt", "value": "red ."}]
    rows.append({"id": "text", "conversations": text})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


Run = Callable[..., tuple[Path, list[float]]]


@pytest.fixture
def run(write_recipe: RecipeWriter, llava_run: Command, clips: Path, tmp_path: Path) -> Run:
    """A function that trains on the videos with a tiling; returns the model and the losses."""

    def call(tiling: str, *overrides: str) -> tuple[Path, list[float]]:
        out = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        path = write_recipe()
        sets = [f"model.tiling={TILINGS[tiling]}", "steps.1.skip=true",
                f'steps.finetune.data={{ use = "conversations", path = "{clips}/rows.json" }}',
                *overrides]  # fmt: skip
        code, _, err = llava_run(path, "--out", out, *[s for one in sets for s in ("--set", one)])
        assert code == 0, err
        lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        return out / "model", [line["loss"] for line in lines if line["event"] == "train"]

    return call


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_model_is_trained_on_videos_and_answers_about_them(
    run: Run, clips: Path, tiling: str
) -> None:
    folder, losses = run(tiling, "steps.finetune.epochs=6")
    assert losses[-1] < 0.5 * losses[0]
    model: Any = llavakit.load(folder)
    ask = "what colour is it ?"
    red, blue = Video(clips / "0"), Video(clips / "3")
    first = model.generate(f"<video>\n{ask}", [red])
    assert first == model.generate(ask, [red])  # without a mark it stands in front
    parts = [{"type": "video", "path": str(clips / "0")}, {"type": "text", "text": ask}]
    assert first == model.generate([{"role": "user", "content": parts}])
    frames = [{"type": "video"}, {"type": "text", "text": ask}]
    assert first == model.generate([{"role": "user", "content": frames}], [red])
    assert not torch.equal(model.logits(ask, [red]), model.logits(ask, [blue]))
    with pytest.raises(DataError, match="a `<video>` has no video to show"):
        model.generate(f"<video>\n{ask}")
    with pytest.raises(DataError, match="2 images for 1"):
        model.generate(f"<video>\n{ask}", [red, blue])


@pytest.mark.parametrize("tiling", TILINGS)
def test_cached_features_train_as_encoded_ones(run: Run, tiling: str) -> None:
    cached = run(tiling, "steps.finetune.cache_features=true")[1]
    encoded = run(tiling, "steps.finetune.cache_features=false")[1]
    assert cached == pytest.approx(encoded, abs=2e-6)


def test_a_model_without_videos_refuses_them(
    write_recipe: RecipeWriter, refused: Callable[..., str], clips: Path, tmp_path: Path
) -> None:
    path = write_recipe()
    data = f'steps.finetune.data={{ use = "conversations", path = "{clips}/rows.json" }}'
    for tiling in ("single", "native", "grid"):
        said = refused(path, "--out", tmp_path / "run", "--set", "steps.1.skip=true", "--set", data,
                       "--set", f'model.tiling={{ use = "{tiling}" }}')  # fmt: skip
        assert "sample `v0` shows a video, and the tiling" in said
        assert f"`{tiling}` shows none as it is set" in said


def test_a_question_that_a_model_cannot_read_is_named(
    write_recipe: RecipeWriter, llava_run: Command, refused: Callable[..., str], clips: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    assert llava_run(write_recipe(), "--out", out, "--set", "steps.2.skip=true").code == 0
    said = refused("predict", out / "model", clips / "rows.json", tmp_path / "a.jsonl")
    assert "question `v0`: the prompt shows a video, and the tiling `single`" in said
    assert "`changes.tiling` behind `init`" in said
    assert not (tmp_path / "a.jsonl").exists()


def test_pooling_in_front_takes_a_connector_of_single_patches(write_recipe: RecipeWriter) -> None:
    registry = Registry.installed()
    change = ("[model.template]", f"[model.tiling]\n{TILINGS['next'][2:-2]}\n\n[model.template]")
    change = (change[0], change[1].replace(", grids", "\ngrids").replace(", video", "\nvideo"))
    path = write_recipe(
        change, ('connector = { use = "mlp" }', 'connector = { use = "pool", grid = 2 }')
    )
    with pytest.raises(ModelError, match=r"pools features before the connector, and .* `pool`"):
        create_model(Recipe.load(path, registry).model, registry, seed=0)


def test_one_view_is_as_before_where_videos_may_be_shown(write_recipe: RecipeWriter) -> None:
    """An image of a model that could show videos has the rows and logits of one that cannot."""
    registry = Registry.installed()
    plain = create_model(Recipe.load(write_recipe(), registry).model, registry, seed=0)
    change = ("[model.template]", "[model.tiling]\nuse = 'single'\nvideo = {}\n\n[model.template]")
    able = create_model(Recipe.load(write_recipe(change), registry).model, registry, seed=0)
    assert isinstance(plain, LlavaModel)
    assert "tiling" not in plain.choices
    assert able.choices["tiling"]["video"] is not None
    image = np.full((30, 40, 3), 90, np.uint8)
    found = [one.logits("what colour is it ?", [image]) for one in (plain, able)]
    assert torch.equal(*found)


def test_a_plan_counts_the_rows_of_a_video(
    write_recipe: RecipeWriter, llava_run: Command, clips: Path
) -> None:
    data = f'steps.finetune.data={{ use = "conversations", path = "{clips}/rows.json" }}'
    for tiling, rows in (("onevision", 4 * 4 + 1), ("next", 3 * 4), ("single", 4 * (4 + 1))):
        asked = llava_run(write_recipe(), "--plan", "--set", data,
                          "--set", f"model.tiling={TILINGS[tiling]}")  # fmt: skip
        assert asked.code == 0, asked.err
        frames = 3 if tiling == "next" else 4
        said = " ".join(asked.out.split())
        assert f"a video of {frames} frames takes {rows} tokens" in said


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_plan_counts_the_frames_that_training_reads(
    write_recipe: RecipeWriter, clips: Path, tiling: str
) -> None:
    """And the images beside them, and that some samples have none."""
    registry = Registry.installed()
    rows = f'{{ use = "conversations", path = "{clips}/rows.json" }}'
    sets = [f"model.tiling={TILINGS[tiling]}", f"steps.finetune.data={rows}"]
    recipe = Recipe.load(write_recipe(), registry, sets)
    views = create_model(recipe.parts(), registry, seed=0).views
    use = Use[Dataset].model_validate({"use": "conversations", "path": f"{clips}/rows.json"})
    shown = [views.shown(sample.images, "a sample") for sample in registry.build(use)]
    arranged = [
        # of images a plan does not look at the size
        [views.of(one if one.frames else USUAL._replace(images=one.images)) for one in of_sample]
        for of_sample in shown
    ]
    expected = [
        (sum(one.views for one in of_sample), sum(len(one.index_RK) for one in of_sample))
        for of_sample in arranged
    ]
    found = usual_visuals(use, views)
    assert [(one.views, one.rows) for one in found] == expected
    assert (0, 0) in expected
    twice = {"use": "mix", "parts": [use.model_dump()] * 2, "weights": [1, 2]}
    mixed = usual_visuals(Use[Dataset].model_validate(twice), views)
    assert [(one.views, one.rows) for one in mixed] == expected * 2
    assert [one.samples for one in mixed] == pytest.approx([1.0] * 15 + [2.0] * 15)

    plan = make_plan(recipe, registry).steps["02-finetune"]
    _, text = Conversations.expect(registry.options(use)) or (0, 0)
    rows_of = sum(min(256, rows + text) for _, rows in expected)
    assert plan.samples == 2 * len(expected)
    assert plan.tokens == 2 * rows_of
    cache = [*sets, f'steps.finetune.feature_cache="{clips}/cache"']
    note = (
        make_plan(Recipe.load(write_recipe(), registry, cache), registry).steps["02-finetune"].note
    )
    size = sum(count for count, _ in expected) * 16 * 32 * 4 / 1e9
    assert f"features take up to {size:,.3g} GB" in note


def test_a_plan_of_videos_that_are_not_here_yet_takes_them_for_long_ones(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"video": "a.mp4", "conversations": turns}]))
    registry = Registry.installed()
    recipe = Recipe.load(write_recipe(), registry, [f"model.tiling={TILINGS['next']}"])
    views = create_model(recipe.parts(), registry, seed=0).views
    use = Use[Dataset].model_validate({"use": "conversations", "path": f"{tmp_path}/rows.json"})
    assert [tuple(one) for one in usual_visuals(use, views)] == [(3, 12, 1.0)]
