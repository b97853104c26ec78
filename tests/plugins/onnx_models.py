"""Small models to export, and the export that the tests share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tests.conftest import LANGUAGE, VISION, make_tokenizer

from llavakit import LlavaModel, Registry
from llavakit.model.folder import create_model
from llavakit.recipe.model_choice import ModelRecipe

HEADS_OF_16: dict[str, Any] = {**LANGUAGE, "hidden_size": 64}
"""GroupQueryAttention takes head sizes that are a multiple of 8; LANGUAGE's are of 12."""


def make_model(
    language: Mapping[str, Any] = HEADS_OF_16,
    *,
    use: str = "vicuna",
    template: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    connector: str = "mlp",
    tiling: Mapping[str, Any] | None = None,
) -> LlavaModel:
    """Return a LLaVA with random weights, the same each time."""
    recipe = ModelRecipe.model_validate(
        {
            "vision": vision or {"use": "clip", "config": VISION},
            "connector": {"use": connector},
            "language": {"use": use, "config": dict(language)},
            "template": template or {"use": "vicuna_v1", "system": ""},
            "tiling": tiling,
        }
    )
    model = create_model(recipe, Registry.installed(), seed=0).eval()
    model.language.tokenizer = make_tokenizer()
    return model


def make_pictures(folder: Path) -> list[Path]:
    """Write two pictures: one wide, one high."""
    draw = np.random.default_rng(3)
    paths = []
    for number, size in enumerate(((40, 56, 3), (64, 33, 3))):
        pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(pixels).resize(size[1::-1], Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths
