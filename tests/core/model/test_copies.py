"""A loaded model can be sent to another process, and copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RecipeWriter
from tests.plugins.made_checkpoints import pictures

import llavakit
from llavakit import Recipe, Registry
from llavakit.model.folder import create_model, save_model


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own


@pytest.mark.parametrize("copied", [_pickled, copy.deepcopy])
@pytest.mark.parametrize("language", [
    'use = "vicuna"', 'use = "causal-lm"', 'use = "vicuna"\nlora = {rank = 2}',
])  # fmt: skip
def test_a_copy_answers_the_same(
    language: str, copied: Callable[[Any], Any], write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    registry = Registry.installed()
    recipe = Recipe.load(write_recipe(('use = "vicuna"', language)), registry)
    save_model(create_model(recipe.parts(), registry, seed=0), tmp_path / "model")
    model = llavakit.load(tmp_path / "model", device="cpu")
    images = pictures(1)
    expected = model.generate_ids("what is it ?", images, max_new_tokens=6)
    assert copied(model).generate_ids("what is it ?", images, max_new_tokens=6) == expected
