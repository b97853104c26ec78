"""LLaVA-NeXT in transformers' layout and in the original's, against transformers' own class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.plugins.made_checkpoints import (
    PROMPTS,
    ask_hf,
    export_alike,
    make_hf,
    read_processor,
    weight_files,
)

import llavakit
from llavakit import ModelError, save_model
from llavakit_plugins.checkpoints.hf import Hf
from llavakit_plugins.checkpoints.original import Original
from llavakit_plugins.tilings.anyres import Anyres

GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
LONG = {"max_position_embeddings": 1024}
SIZES = [(50, 40), (300, 31), (1, 1), (33, 90)]


def pictures(count: int, start: int = 0) -> list[Image.Image]:
    draw = np.random.default_rng(count)
    chosen = [SIZES[(start + number) % len(SIZES)] for number in range(count)]
    return [
        Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in chosen
    ]


@pytest.fixture(scope="module", params=["clip+llama", "siglip+qwen2", "two layers"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("next") / "checkpoint"
    more: dict[str, Any] = {"vision": "clip", "language": "llama"}
    if request.param == "two layers":
        more["vision_feature_layer"] = [-2, -1]
    else:
        more["vision"], more["language"] = request.param.split("+")
    return make_hf(folder, grids=GRIDS, **more), folder


def same_answers(theirs: Any, folder: Path, ours: Any) -> None:
    processor = read_processor(folder)
    for start, (prompt, count) in enumerate(PROMPTS):
        images = pictures(count, start)
        inputs = ask_hf(processor, prompt, images)
        with torch.no_grad():
            expected = theirs(**inputs).logits[0]
        torch.testing.assert_close(
            ours.logits(prompt, images, raw=True), expected, atol=1e-5, rtol=1e-5
        )
        tokens = theirs.generate(
            **inputs, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=3
        )[0, inputs["input_ids"].shape[1] :].tolist()
        assert ours.generate_ids(prompt, images, max_new_tokens=6, raw=True) == tokens


def test_what_transformers_saved_is_the_same_model(checkpoint: tuple[Any, Path]) -> None:
    theirs, folder = checkpoint
    ours = llavakit.load(folder, device="cpu")
    assert isinstance(ours.tiling, Anyres)
    assert list(ours.tiling.options.grids) == GRIDS
    same_answers(theirs, folder, ours)


def test_import_and_export_are_byte_identical(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    from transformers import LlavaNextForConditionalGeneration

    _, folder = checkpoint
    save_model(llavakit.load(folder, device="cpu"), tmp_path / "native")
    model = llavakit.load(folder, device="cpu")
    again = export_alike(LlavaNextForConditionalGeneration, model, folder, tmp_path / "out")
    same_answers(again, tmp_path / "out", llavakit.load(tmp_path / "out", device="cpu"))
    save_model(llavakit.load(tmp_path / "out", device="cpu"), tmp_path / "twice")
    assert weight_files(tmp_path / "native") == weight_files(tmp_path / "twice")


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("points", [[[32, 33]], [[32]], [], "32x64", [[0, 32]]])
def test_grids_of_broken_tiles_are_refused(points: Any, tmp_path: Path) -> None:
    make_hf(tmp_path / "m", grids=GRIDS)
    edited(tmp_path / "m" / "config.json", lambda table: table.update(image_grid_pinpoints=points))
    with pytest.raises(ModelError, match="must list pairs of multiples of 32"):
        llavakit.load(tmp_path / "m", device="cpu")


@pytest.mark.parametrize("option", [
    {"cap": 9}, {"newline": False}, {"unpad": False}, {"max_tiles": 2}, {"interpolation": "box"},
])  # fmt: skip
def test_other_tilings_do_not_fit(option: dict[str, Any], tmp_path: Path) -> None:
    make_hf(tmp_path / "m", grids=GRIDS)
    model = llavakit.load(tmp_path / "m", device="cpu")
    model.tiling = Anyres(Anyres.Options(**option))
    with pytest.raises(ModelError, match=r"tiling `anyres` with these options does not fit"):
        Hf().check(model)


# -- the original's layout -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model, and the folder that the original would read; the export compares the two."""
    folder = tmp_path_factory.mktemp("original")
    make_hf(folder / "hf", grids=GRIDS)
    model = llavakit.load(folder / "hf", device="cpu")
    figures = Original().export(model, folder / "out")
    assert figures["largest_logit_difference"] < 1e-5
    return model, folder / "out"


def test_the_originals_layout_holds_the_same_model(original: tuple[Any, Path]) -> None:
    model, folder = original
    config = json.loads((folder / "config.json").read_text())
    assert config["image_aspect_ratio"] == "anyres"
    assert config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"][0] == [64, 32]  # width and height of one row of two tiles
    assert "model.image_newline" in load_file(folder / "model.safetensors")
    again = llavakit.load(folder, device="cpu")
    for start, (prompt, count) in enumerate(PROMPTS):
        images = pictures(count, start)
        assert torch.equal(
            again.logits(prompt, images, raw=True), model.logits(prompt, images, raw=True)
        )


@pytest.mark.parametrize(("changes", "expected"), [
    ({"image_grid_pinpoints": "[(64, 32), (32, 96)]"}, {"grids": ((1, 2), (3, 1))}),
    ({"image_grid_pinpoints": "(1x1),...,(2x2)", "image_aspect_ratio": "anyres_max_4"},
     {"grids": ((1, 1), (2, 1), (1, 2), (2, 2)), "cap": 4}),
    ({"mm_patch_merge_type": "spatial"}, {"unpad": False, "newline": False}),
])  # fmt: skip
def test_what_the_originals_configuration_can_say(
    original: tuple[Any, Path], changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(original[1], tmp_path / "m")
    edited(tmp_path / "m" / "config.json", lambda table: table.update(changes))
    options = llavakit.load(tmp_path / "m", device="cpu").tiling.options
    assert {name: getattr(options, name) for name in expected} == expected


def test_an_original_without_its_row_is_refused(original: tuple[Any, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(original[1], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.image_newline"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="lacks image_newline"):
        llavakit.load(folder, device="cpu")
