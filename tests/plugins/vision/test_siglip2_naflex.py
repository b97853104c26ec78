"""SigLIP 2 with NaFlex, against transformers' own model and image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llavakit
from llavakit import IMAGE_ID, ModelRecipe, Registry, Shown, Tiling, View, pack, save_model
from llavakit.contracts.component import Options
from llavakit.model.folder import create_model
from llavakit.testing import TilingContract
from llavakit_plugins.tilings.native import Native
from llavakit_plugins.vision.siglip2 import Siglip2Naflex

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_patches": 16, "patch_size": 8, "vision_use_head": False,
}  # fmt: skip
SIZES = [(32, 32), (90, 40), (40, 90), (1, 1), (400, 30), (33, 31)]


class TestNative(TilingContract):
    any_size = True

    def build(self) -> Tiling:
        return Native(Options())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

    folder = tmp_path_factory.mktemp("siglip2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Siglip2VisionModel(Siglip2VisionConfig(**SHAPE)).save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return folder


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


@torch.inference_mode()
def test_features_and_rows_are_those_of_transformers(source: Path) -> None:
    from transformers import Siglip2ImageProcessorPil, Siglip2VisionModel

    theirs = Siglip2VisionModel.from_pretrained(source).eval()
    inputs = Siglip2ImageProcessorPil.from_pretrained(source)(pictures(), return_tensors="pt")
    expected = theirs(**inputs, output_hidden_states=True).hidden_states[-2]
    options = Siglip2Naflex.Options(source=str(source))
    ours = Siglip2Naflex.create(options).eval()
    found = ours(torch.stack([ours.prepare(image) for image in pictures()]))  # a mixed batch
    view = View(ours.image_size, ours.tokens(ours.image_size))
    for number, (width, height) in enumerate(SIZES):
        rows = Native(Options()).arrange(Shown(width, height), view).index_RK[:, 0]
        real = int(inputs["pixel_attention_mask"][number].sum())
        assert rows.tolist() == list(range(real))
        assert inputs["spatial_shapes"][number].prod() == real
        torch.testing.assert_close(
            found[number, :real], expected[number, :real], atol=1e-5, rtol=1e-5
        )


def test_a_model_with_it_takes_as_many_rows_as_there_are_patches(
    source: Path, backbones: Path, tmp_path: Path
) -> None:
    table = {
        "vision": {"use": "siglip2-naflex", "source": str(source)},
        "connector": {"use": "mlp"},
        "language": {"use": "vicuna", "source": str(backbones / "language")},
        "template": {"use": "vicuna_v1", "system": ""},
    }
    model = create_model(ModelRecipe.model_validate(table), Registry.installed(), seed=1)
    save_model(model, tmp_path / "model")
    loaded = llavakit.load(tmp_path / "model", device="cpu")
    assert loaded.tiling.name == "native"  # the encoder's own: the recipe named none
    images = pictures()[1:4]
    alone = [loaded.logits("what is it ?", [image]) for image in images]
    for image, logits in zip(images, alone, strict=True):
        encoded = loaded.prompt("what is it ?", [image])
        assert len(logits) == encoded.length(loaded.visual_tokens)
        assert len(logits) < len(encoded.ids) + loaded.visual_tokens
    encoded = [loaded.prompt("what is it ?", [image]) for image in images]
    batch = pack(encoded, range(3), loaded.visual_tokens)
    pixels = loaded.join([loaded.prepare([image]) for image in images])
    with torch.inference_mode():
        hidden = loaded.language.hidden(loaded.embed(batch, loaded.features(pixels)), batch.packing)
        together = loaded.language.logits(hidden).float()
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert all((item.ids == IMAGE_ID).sum() == 1 for item in encoded)
