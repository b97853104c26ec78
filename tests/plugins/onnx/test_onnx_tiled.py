"""ONNX folders of models with tilings: the graph sees views, the arrangement is outside of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugins.made_checkpoints import ask_hf, make_hf, read_processor

pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

import llavakit
from llavakit import ModelRecipe, Registry, Sampling, Video
from llavakit.model.folder import create_model
from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions

SIZES = [(97, 61), (30, 80), (1, 1)]


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


@pytest.mark.parametrize("tiling", [
    {"use": "anyres"},
    {"use": "anyres", "grids": [[2, 2]], "cap": 1, "newline": False},
    {"use": "grid", "rows": 1},
])  # fmt: skip
def test_an_exported_model_answers_as_torch_does(
    backbones: Path, tmp_path: Path, tiling: dict[str, Any]
) -> None:
    table = {
        "vision": {"use": "clip", "source": str(backbones / "vision")},
        "connector": {"use": "mlp"},
        "language": {"use": "vicuna", "source": str(backbones / "language")},
        "template": {"use": "vicuna_v1", "system": ""},
        "tiling": tiling,
    }
    model = create_model(ModelRecipe.model_validate(table), Registry.installed(), seed=1).eval()
    figures = Onnx(OnnxOptions()).export(model, tmp_path / "out")
    assert figures["fp32 largest"] < 1e-4
    loaded = llavakit.load(tmp_path / "out", device="cpu")
    assert model.tiling is not None
    assert vars(loaded.views.tiling)["options"] == vars(model.tiling)["options"]
    shown = [[image] for image in pictures()] + [pictures()[:2], []]
    prompts = [("<image>" * len(images) + " what is it ?", images) for images in shown]
    for prompt, images in prompts:
        expected = model.logits(prompt, images)
        found = torch.as_tensor(loaded.logits(prompt, images))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert loaded.prompt(prompt, images).length(loaded.visual_tokens) == len(found)
    assert loaded.answer_ids(prompts, Sampling(4)) == model.answer_ids(prompts, Sampling(4))


ALL = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]


def test_onevision_answers_as_transformers_does(tmp_path: Path) -> None:
    """Tiles are interpolated, several images padded, frames pooled: all behind the graph."""
    theirs = make_hf(
        tmp_path / "hf", vision="siglip", language="qwen2", family="Onevision", grids=ALL
    )
    processor = read_processor(tmp_path / "hf")
    Onnx(OnnxOptions()).export(llavakit.load(tmp_path / "hf", device="cpu"), tmp_path / "out")
    loaded = llavakit.load(tmp_path / "out", device="cpu")
    first, second = pictures()[:2]
    large = pictures()[0].resize((180, 170))
    frames = [first.resize((32, 32)), second.resize((32, 32)), first.resize((32, 32))]
    capped = loaded.prompt("<image> it is", [large], raw=True)
    assert capped.arranged is not None
    assert capped.arranged[0].weights_RK is not None
    for shown in ([large], [first], [first, second], [frames], []):
        marks = ["<video>" if isinstance(one, list) else "<image>" for one in shown]
        prompt = " ".join([*marks, "it is a red circle"])
        videos = [one for one in shown if isinstance(one, list)]
        images = [one for one in shown if isinstance(one, Image.Image)]
        inputs = ask_hf(processor, prompt, images, videos)
        with torch.no_grad():
            expected = theirs(**inputs).logits[0]
        given = [Video(tuple(one)) if isinstance(one, list) else one for one in shown]
        asked = prompt.replace("<video>", "<image>")
        found = torch.as_tensor(loaded.logits(asked, given, raw=True))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
