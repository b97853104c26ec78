"""What tests of training share."""

from __future__ import annotations

import pytest
from tests.conftest import RecipeWriter

from llavakit import LlavaModel, Recipe, Registry
from llavakit.model.folder import create_model


@pytest.fixture
def model(write_recipe: RecipeWriter) -> LlavaModel:
    registry = Registry.installed()
    return create_model(Recipe.load(write_recipe(), registry).parts(), registry, seed=0).eval()
