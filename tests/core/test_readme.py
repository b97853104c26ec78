"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

from llavakit import Connector, Options, Recipe, Registry
from llavakit.testing import ConnectorContract

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def code(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return str(found)


def pooled() -> ModuleType:
    module = ModuleType("llava_pooled")
    exec(compile(code("python", "class Pooled"), "llava_pooled.py", "exec"), module.__dict__)
    sys.modules["llava_pooled"] = module  # as an installed one is: pickle looks there
    return module


class TestPooled(ConnectorContract):
    """The example keeps the contract of its kind; registration is tested with a real package."""

    patches = 16

    def build(self) -> Connector:
        connector: Connector = pooled().Pooled(
            Options(), vision_width=self.vision_width, language_width=self.language_width
        )
        return connector

    # no package is installed here; test_third_party.py installs one
    test_registered_by_an_installed_plugin = None  # type: ignore[assignment]


def test_the_plugin_takes_thirty_lines() -> None:
    assert len(code("python", "class Pooled").splitlines()) <= 30


def test_the_plugin_registers() -> None:
    registry = Registry.empty()
    registry.register(pooled())
    assert list(registry.all(Connector)) == ["pooled"]


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(code("toml", 'name = "mine"'))
    recipe = Recipe.load(path, Registry.installed())
    assert [step.use for step in recipe.steps] == ["pretrain", "finetune"]


def test_the_derived_recipe_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(code("toml", 'base = "tiny"'))
    recipe = Recipe.load(path, Registry.installed())
    finetune = next(step for step in recipe.steps if step.use == "finetune")
    assert finetune.options["train"] == {"connector": 2e-3, "language": 5e-4}
