"""Models with tilings: against transformers' LLaVA-NeXT, processor included, and their folders."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import VISION, make_tokenizer
from tests.core.peer import IMAGE_TOKEN, make_pair, pinpoints

import llavakit
from llavakit import IMAGE_ID, LlavaModel, ModelError, ModelRecipe, Registry, pack, save_model
from llavakit.model.folder import create_model
from llavakit_plugins.tilings.anyres import Anyres, AnyresOptions

EDGE, PATCH = VISION["image_size"], VISION["patch_size"]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, LlavaModel]:
    return make_pair(
        language={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
            "max_position_embeddings": 1024,
        },
        tiling=Anyres(AnyresOptions()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": EDGE},
        crop_size={"height": EDGE, "width": EDGE},
        **pinpoints(Anyres(AnyresOptions())),
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def pictures(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    draw = np.random.default_rng(sum(map(sum, sizes)))
    return [
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]


def sizes() -> list[tuple[int, int]]:
    """Return 42 widths and heights, from 1x1 to 4000x300."""
    drawn = np.random.default_rng(1).integers(1, 900, (36, 2)).tolist()
    fixed = [(1, 1), (4000, 300), (300, 4000), (EDGE, EDGE), (640, 480), (2, 399)]
    return fixed + [(width, height) for width, height in drawn]


def compare(
    pair: tuple[Any, LlavaModel], processor: Any, images: list[Image.Image], *, written: bool
) -> None:
    theirs, ours = pair
    prompt = "<image>" * len(images) + " what colour is it ?"
    inputs = processor(text=prompt, images=images, return_tensors="pt")
    unknown = processor.tokenizer.convert_tokens_to_ids("<image>")
    inputs["input_ids"][inputs["input_ids"] == unknown] = IMAGE_TOKEN
    encoded = ours.prompt(prompt, images, raw=True)
    rows = encoded.expand(ours.visual_tokens)
    ids = np.where(rows.visual, IMAGE_TOKEN, rows.token_ids)
    assert inputs["input_ids"][0].tolist() == ids.tolist()
    pixels = ours.prepare(images)
    assert pixels is not None
    arranged = encoded.arranged
    assert arranged is not None
    wanted = [
        views[: image.views] for views, image in zip(inputs["pixel_values"], arranged, strict=True)
    ]
    assert torch.equal(pixels, torch.cat(wanted))
    with torch.no_grad():
        expected = theirs(**inputs).logits[0]
    found = ours.logits(prompt, images, raw=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if written:
        answer = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert ours.generate_ids(prompt, images, max_new_tokens=6, raw=True) == (
            answer[0, inputs["input_ids"].shape[1] :].tolist()
        )


def test_logits_and_tokens_are_those_of_transformers(
    pair: tuple[Any, LlavaModel], processor: Any
) -> None:
    for number, size in enumerate(sizes()):
        compare(pair, processor, pictures([size]), written=number % 7 == 0)


@pytest.mark.parametrize("count", [2, 3])
def test_several_images_of_different_sizes(
    count: int, pair: tuple[Any, LlavaModel], processor: Any
) -> None:
    all_sizes = sizes()
    for start in range(0, len(all_sizes) - count + 1, 3 * count):
        chosen = pictures(all_sizes[start : start + count])
        compare(pair, processor, chosen, written=start == 0)


def test_a_batch_of_prompts_answers_as_each_alone(pair: tuple[Any, LlavaModel]) -> None:
    ours = pair[1]
    shown = [pictures([(70, 30)]), pictures([(20, 90), (32, 32)]), []]
    prompts = [("<image>" * len(images) + " what is it ?", images) for images in shown]
    sampling = llavakit.Sampling(5)
    together = ours.answer_ids(prompts, sampling, raw=True)
    assert together == [ours.answer_ids([one], sampling, raw=True)[0] for one in prompts]


def test_gradients_are_those_of_transformers(pair: tuple[Any, LlavaModel], processor: Any) -> None:
    """Of the separator row, and of the connector's weights through the index map."""
    theirs, ours = pair
    images = pictures([(70, 30)])
    prompt = "<image> what colour is it ?"
    inputs = processor(text=prompt, images=images, return_tensors="pt")
    unknown = processor.tokenizer.convert_tokens_to_ids("<image>")
    inputs["input_ids"][inputs["input_ids"] == unknown] = IMAGE_TOKEN
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3:] = inputs["input_ids"][0, -3:]
    theirs.zero_grad()
    theirs(**inputs, labels=labels).loss.backward()
    encoded = ours.prompt(prompt, images, raw=True)
    encoded.supervised[-3:] = True
    batch = pack([encoded], [0], ours.visual_tokens)
    pixels = ours.prepare(images)
    assert pixels is not None
    ours.zero_grad()
    (ours.loss(batch, ours.features(pixels)) / 3).backward()
    assert ours.image_newline is not None
    expected = theirs.model.image_newline.grad
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours.image_newline.grad, expected, atol=1e-6, rtol=1e-4)
    first: Any = next(ours.connector.parameters())
    projector = theirs.model.multi_modal_projector.linear_1.weight.grad
    torch.testing.assert_close(first.grad, projector, atol=1e-6, rtol=1e-4)


# -- capped, cut, and blended ----------------------------------------------------------------------


def test_interpolated_rows_learn_as_torch_does(pair: tuple[Any, LlavaModel]) -> None:
    """Rows that are means of embeddings, in one micro-batch with rows that are none."""
    base = pair[1]
    tiling = Anyres(AnyresOptions(grids=((2, 2),), cap=1, newline=False))
    ours = LlavaModel(
        base.vision, base.connector, base.language, base.template, choices={}, tiling=tiling
    )
    images = pictures([(64, 64)])
    encoded = [ours.prompt("<image> red", images, raw=True), base.prompt("blue", [], raw=True)]
    batch = pack(encoded, [0, 1], ours.visual_tokens)
    pixels = ours.prepare(images)
    assert pixels is not None
    features = ours.features(pixels).detach()
    visual = ours.connector(features)  # [5, 16, E]
    grid = visual[1:].unflatten(1, (4, 4)).unflatten(0, (2, 2)).permute(4, 0, 2, 1, 3).flatten(1, 2)
    small = torch.nn.functional.interpolate(grid.flatten(2)[None], (4, 4), mode="bilinear")[0]
    expected = torch.cat([visual[0], small.flatten(1).T])
    found = ours.embed(batch, features)
    rows = encoded[0].expand(ours.visual_tokens).visual
    torch.testing.assert_close(found[: len(rows)][torch.from_numpy(rows)], expected)
    text = ours.language.embed(batch.token_ids_T[len(rows) :])
    torch.testing.assert_close(found[len(rows) :], text)


@pytest.mark.parametrize("kept", [1, 17, 21, 40])
def test_a_sample_that_is_cut_keeps_its_first_rows(kept: int, pair: tuple[Any, LlavaModel]) -> None:
    ours = pair[1]
    images = pictures([(70, 30)])
    whole = ours.prompt("<image> red", images, raw=True)
    cut = llavakit.Encoded(whole.ids, whole.supervised, kept, whole.arranged)
    pixels = ours.prepare(images)
    assert pixels is not None
    features = ours.features(pixels)
    full, short = (
        ours.embed(pack([item], [0], ours.visual_tokens), features) for item in (whole, cut)
    )
    assert short.shape[0] == kept
    torch.testing.assert_close(short, full[:kept])


# -- folders ---------------------------------------------------------------------------------------


def recipe(backbones: Path, tiling: dict[str, Any] | None) -> ModelRecipe:
    table: dict[str, Any] = {
        "vision": {"use": "clip", "source": str(backbones / "vision")},
        "connector": {"use": "mlp"},
        "language": {"use": "vicuna", "source": str(backbones / "language")},
    }
    return ModelRecipe.model_validate(table | ({} if tiling is None else {"tiling": tiling}))


def test_single_writes_the_folder_of_before(backbones: Path, tmp_path: Path) -> None:
    registry = Registry.installed()
    for name, tiling in (("none", None), ("single", {"use": "single"})):
        save_model(create_model(recipe(backbones, tiling), registry, seed=1), tmp_path / name)
    manifests = [(tmp_path / name / "model.toml").read_bytes() for name in ("none", "single")]
    assert manifests[0] == manifests[1]
    assert b"tiling" not in manifests[0]
    assert not list(tmp_path.rglob("tiling.safetensors"))


def test_a_folder_keeps_tiling_and_separator(backbones: Path, tmp_path: Path) -> None:
    registry = Registry.installed()
    stated = recipe(backbones, {"use": "anyres", "grids": [[1, 2], [2, 1]]})
    model = create_model(stated, registry, seed=1)
    plain = create_model(recipe(backbones, None), registry, seed=1)
    for ours, theirs in zip(
        model.connector.parameters(), plain.connector.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)  # the new row changes no other new weight
    assert model.image_newline is not None
    assert model.image_newline.std().item() == pytest.approx(model.language.width**-0.5, rel=0.3)
    save_model(model, tmp_path / "model")
    manifest = tomllib.loads((tmp_path / "model" / "model.toml").read_text())
    assert manifest["tiling"] == {"use": "anyres", "grids": [[1, 2], [2, 1]]}
    loaded = llavakit.load(tmp_path / "model", device="cpu")
    assert torch.equal(loaded.image_newline, model.image_newline)
    images = pictures([(100, 40)])
    question = "what is it ?"
    torch.testing.assert_close(
        loaded.logits(question, images), model.eval().logits(question, images)
    )
    encoded = loaded.prompt(question, images)
    assert encoded.length(loaded.visual_tokens) == len(loaded.logits(question, images))
    assert (encoded.ids == IMAGE_ID).sum() == 1
    (tmp_path / "model" / "tiling.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks tiling.safetensors"):
        llavakit.load(tmp_path / "model", device="cpu")
