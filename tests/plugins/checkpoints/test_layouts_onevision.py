"""LLaVA-OneVision in transformers' layout, and read from the original's, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.plugins.made_checkpoints import (
    PROMPTS,
    SIGLIP,
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

GRIDS = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]
QUESTION = PROMPTS[0][0]
TWO, NONE = PROMPTS[1][0], PROMPTS[2][0]
THREE = "USER : <image> a red circle <image> <image> what is it in ? ASSISTANT :"
IMAGE_TOKEN = 22


def sizes() -> list[tuple[int, int]]:
    """Return widths and heights: corners, usual ones, and some that were drawn."""
    drawn = np.random.default_rng(0).integers(1, 500, (30, 2)).tolist()
    fixed = [
        (1, 1), (1, 2), (2, 1), (31, 33), (32, 32), (33, 31), (64, 32), (65, 64), (192, 192),
        (193, 192), (640, 480), (480, 640), (4000, 300), (300, 4000), (1, 199),
    ]  # fmt: skip
    return fixed + [(width, height) for width, height in drawn]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng((seed, width, height))
    small = draw.integers(0, 256, (min(height, 40), min(width, 40), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", params=["siglip+qwen2", "clip+llama"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("onevision") / "checkpoint"
    vision, language = request.param.split("+")
    made = make_hf(folder, grids=GRIDS, family="Onevision", vision=vision, language=language)
    return made, folder


def same_answer(
    theirs: Any, processor: Any, ours: Any, prompt: str, images: list[Image.Image]
) -> int:
    """Check pixels, ids, logits and a greedy answer; return how many rows the images took."""
    inputs = ask_hf(processor, prompt, images)
    encoded = ours.prompt(prompt, images, raw=True)
    rows = encoded.expand(ours.visual_tokens)
    ids = np.where(rows.visual, IMAGE_TOKEN, rows.token_ids)
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    if images:
        views = [
            pixels[: arranged.views]
            for pixels, arranged in zip(inputs["pixel_values"], encoded.arranged, strict=True)
        ]
        assert torch.equal(ours.prepare(images), torch.cat(views))
    with torch.no_grad():
        expected = theirs(**inputs).logits[0]
    torch.testing.assert_close(
        ours.logits(prompt, images, raw=True), expected, atol=1e-5, rtol=1e-5
    )
    found = theirs.generate(
        **inputs, max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=3
    )
    tokens = found[0, inputs["input_ids"].shape[1] :].tolist()
    assert ours.generate_ids(prompt, images, max_new_tokens=3, raw=True) == tokens
    return int(rows.visual.sum())


def test_what_transformers_saved_is_the_same_model(checkpoint: tuple[Any, Path]) -> None:
    theirs, folder = checkpoint
    ours = llavakit.load(folder, device="cpu")
    assert isinstance(ours.tiling, Anyres)
    assert (ours.tiling.options.cap, ours.tiling.options.only_alone) == (9, True)
    assert list(ours.tiling.options.grids) == GRIDS
    processor = read_processor(folder)
    counts = {
        size: same_answer(theirs, processor, ours, QUESTION, [picture(*size)]) for size in sizes()
    }
    assert counts[32, 32] == 16 + 4 * 5  # the view, and one tile with a new row behind each line
    assert max(counts.values()) <= 16 + 1.1**2 * 9 * 16 + 24  # capped, and as many new rows
    for number, prompt in ((2, TWO), (3, THREE)):
        for start in range(0, 12, number):
            images = [picture(*size, start) for size in sizes()[start : start + number]]
            assert same_answer(theirs, processor, ours, prompt, images) == number * 17
    assert same_answer(theirs, processor, ours, NONE, []) == 0


def test_import_and_export_are_byte_identical(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    from transformers import LlavaOnevisionForConditionalGeneration

    _, folder = checkpoint
    save_model(llavakit.load(folder, device="cpu"), tmp_path / "native")
    model = llavakit.load(tmp_path / "native", device="cpu")
    again = export_alike(LlavaOnevisionForConditionalGeneration, model, folder, tmp_path / "out")
    config, first = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", folder)
    )
    for key in ("image_token_index", "video_token_index", "vision_aspect_ratio"):
        assert config[key] == first[key]
    # as transformers writes its own processor, so it reads ours
    processor, theirs = read_processor(tmp_path / "out"), read_processor(folder)
    for part in ("image_processor", "video_processor"):
        own, other = (getattr(one, part).to_dict() for one in (processor, theirs))
        assert own | {"size": None} == other | {"size": None}
    ours = llavakit.load(tmp_path / "out", device="cpu")
    for prompt, shown in ((QUESTION, [(300, 31)]), (TWO, [(50, 40), (33, 90)]), (NONE, [])):
        same_answer(again, processor, ours, prompt, [picture(*size) for size in shown])
    save_model(ours, tmp_path / "twice")
    assert weight_files(tmp_path / "native") == weight_files(tmp_path / "twice")


@pytest.mark.parametrize("option", [
    {"only_alone": False}, {"pad": None}, {"pad": (0.1, 0.2, 0.3)}, {"newline": False},
    {"unpad": False}, {"max_tiles": 4},
])  # fmt: skip
def test_other_tilings_do_not_fit(option: dict[str, Any], tmp_path: Path) -> None:
    make_hf(tmp_path / "m", grids=GRIDS, family="Onevision")
    model = llavakit.load(tmp_path / "m", device="cpu")
    own = model.tiling.options.model_dump()
    model.tiling = Anyres(Anyres.Options(**own | option))
    with pytest.raises(ModelError, match=r"tiling `anyres` with these options does not fit"):
        Hf().check(model)


@pytest.mark.parametrize("aspect", ["anyres", "anyres_max_0", "pad", 9])
def test_an_aspect_that_transformers_cannot_read_either_is_refused(
    aspect: Any, tmp_path: Path
) -> None:
    make_hf(tmp_path / "m", grids=GRIDS, family="Onevision")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_aspect_ratio": aspect}))
    with pytest.raises(ModelError, match=r"`vision_aspect_ratio` is .* must be anyres_max_9"):
        llavakit.load(tmp_path / "m", device="cpu")


# -- the original's layout -------------------------------------------------------------------------


def make_original(made: Any, hf: Path, folder: Path, *, inside: bool) -> None:
    """Write a checkpoint as OneVision's own code does, of the weights of transformers' class.

    It cuts off SigLIP's last layer and its head: they are in the tower's folder, and not inside.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    state = load_file(hf / "model.safetensors")
    tower = {
        name.removeprefix("vision_tower."): tensor
        for name, tensor in state.items()
        if name.startswith("vision_tower.") and ".head." not in name
    }
    layers = SIGLIP["num_hidden_layers"] + 1
    whole = SiglipVisionModel(SiglipVisionConfig(**{**SIGLIP, "num_hidden_layers": layers}))
    whole.load_state_dict(tower, strict=False)
    whole.save_pretrained(folder / "tower")
    tensors = {"model.image_newline": state["image_newline"]}
    for number, name in ((0, "linear_1"), (2, "linear_2")):
        for what in ("weight", "bias"):
            tensor = state[f"multi_modal_projector.{name}.{what}"]
            tensors[f"model.mm_projector.{number}.{what}"] = tensor
    for name, tensor in state.items():
        if name.startswith("language_model."):
            tensors[name.removeprefix("language_model.")] = tensor
    if inside:
        prefix = "model.vision_tower.vision_tower.vision_model."
        tensors |= {prefix + name: tensor for name, tensor in tower.items()}
    checkpoint = folder / "checkpoint"
    read_processor(hf).tokenizer.save_pretrained(checkpoint)
    save_file(tensors, checkpoint / "model.safetensors")
    text = made.config.text_config.to_dict()
    config = text | {
        "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava",
        "image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "(1x1),...,(6x6)",
        "mm_hidden_size": 32, "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -7,
        "mm_vision_select_feature": "cls_patch", "mm_vision_tower": "../tower",
        "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "one_token",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "tokenizer_model_max_length": 32768, "image_token_index": IMAGE_TOKEN,
    }  # fmt: skip
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("inside", [True, False])
def test_the_originals_layout_is_the_same_model(inside: bool, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    colours = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    theirs = make_hf(
        hf, grids=GRIDS, family="Onevision", vision="siglip", language="qwen2", colours=colours
    )
    make_original(theirs, hf, tmp_path, inside=inside)
    ours = llavakit.load(tmp_path / "checkpoint", device="cpu")
    processor = read_processor(hf)
    for size in sizes()[::3]:
        same_answer(theirs, processor, ours, QUESTION, [picture(*size)])
    for prompt, shown in ((TWO, sizes()[4:6]), (NONE, [])):
        same_answer(theirs, processor, ours, prompt, [picture(*size) for size in shown])
    options = ours.tiling.options
    assert (options.cap, options.only_alone, options.pad) == (9, True, (0.5, 0.5, 0.5))
    assert options.video == llavakit.load(hf, device="cpu").tiling.options.video


@pytest.mark.parametrize(("changes", "expected"), [
    ({"mm_newline_position": "grid", "mm_spatial_pool_mode": "average"}, ("average", "row")),
    ({"mm_newline_position": "frame"}, ("interpolate", "frame")),
    ({"mm_patch_merge_type": "spatial"}, ("interpolate", "none")),
    ({"mm_spatial_pool_mode": "max"}, None),
    ({"add_faster_video": True}, None),
    ({"mm_spatial_pool_mode": None}, None),
    ({"mm_spatial_pool_mode": ["max"]}, None),
])  # fmt: skip
def test_what_the_original_says_of_videos(
    changes: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    made = make_hf(
        tmp_path / "hf", grids=GRIDS, family="Onevision", vision="siglip", language="qwen2"
    )
    make_original(made, tmp_path / "hf", tmp_path, inside=True)
    path = tmp_path / "checkpoint" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    video = llavakit.load(tmp_path / "checkpoint", device="cpu").tiling.options.video
    assert (video and (video.pool, video.newline)) == expected


def test_the_original_has_no_cap(tmp_path: Path) -> None:
    make_hf(tmp_path / "m", grids=GRIDS, family="Onevision")
    with pytest.raises(ModelError, match="does not interpolate an image's tiles"):
        Original().check(llavakit.load(tmp_path / "m", device="cpu"))
