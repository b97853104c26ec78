"""ONNX folders of models with tilings: the graph sees views, the arrangement is outside of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

import llavakit
from llavakit import ModelRecipe, Registry, Sampling
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
