"""What `--plan` accepts, the run does not refuse for the recipe's sake.

Built-in recipes with tiny weights and data, changed at random and given an export of any layout:
each is planned, and where the plan is content, the run has to be.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings, strategies as st
from tests.conftest import Command
from tests.core.recipe.test_builtin_recipes import NAMES, QUANTIZED, load, small

from llavakit.recipe.recipe import find_recipe, read_tables

RECIPES = [name for name in NAMES if name not in QUANTIZED]
STEP = {
    "epochs": ["0", "2"],
    "batch_size": ["0", "1", "3"],
    "micro_batch_tokens": ["1", "300"],
    "warmup": ["0", "1"],
    "precision": ["fp32", "bf16"],
    "shard": ["true", "false"],
    "recompute": ["true"],
    "cache_features": ["true", "false"],
    "template": ['{ use = "vicuna_v1" }', '{ use = "plain", system = "x" }', '{ use = "mpt" }'],
    "prepare": ['{ aspect = "pad" }', "{ config = { image_size = 64 } }", "{ layer = 99 }"],
    "train": ["{ vision = 1e-3 }", "{ language = 1e-3 }", "{}"],
    "skip": ["true"],
    "init": ["WHOLE", "EMPTY", "@pretrain/model", "@pretrain/best", "@finetune/model"],
    "load": ['{ template = "llava_v0" }', '{ base = "WHOLE" }'],
    "changes": [
        "{ language = { lora = { rank = 2 } } }",
        '{ language = { lora = { targets = ["none"] } } }',
        "{ language = { max_length = 200 } }",
        "{ language = { max_length = 9 } }",
        '{ language = { dtype = "bfloat16" } }',
        '{ vision = { select = "cls_patch" } }',
        "{ vision = { layer = -9 } }",
        "{ connector = {} }",
    ],
}  # fmt: skip
MODEL = {
    "vision.layer": ["-1", "0", "-3", "-99"],
    "vision.select": ["cls_patch"],
    "vision.aspect": ["pad", "squash", "stretch"],
    "vision.norm": ["true"],
    "connector": [
        '{ use = "mlp", depth = 3 }', '{ use = "identity" }', '{ use = "pool" }',
        '{ use = "pool", grid = 2 }',
    ],
    "template": ['{ use = "llava_llama_2" }', '{ use = "mistral_instruct" }', '{ use = "mpt" }'],
    "template.image_placement": ["keep", "middle"],
    "language.max_length": ["16", "200"],
    "language.lora": ["{ rank = 2 }", '{ rank = 2, targets = ["none"] }'],
}  # fmt: skip
TOP = {"device": ["gpu0", "meta", "cpu"], "seed": ["1", "-1"], "trackers": ["[]"]}
FORMATS: tuple[dict[str, str] | None, ...] = (
    None,
    {},
    {"use": "hf"},
    {"use": "hf", "projector": "gelu"},
    {"use": "original"},
)
"""Of an export at the end; None is none, and the empty one a model folder."""


def changes(table: Mapping[str, list[str]], prefix: str) -> st.SearchStrategy[str]:
    stated = [f"{prefix}{key}={value}" for key, values in table.items() for value in values]
    return st.sampled_from(stated)


MUTATIONS = st.lists(
    st.one_of(
        *(changes(STEP, f"steps.{number}.") for number in (1, 2)),
        changes(MODEL, "model."),
        changes(TOP, ""),
    ),
    max_size=3,
)


class Tiny:
    """Runs built-in recipes made tiny, with changes and an export behind their steps."""

    def __init__(self, run: Command, places: tuple[Any, ...], folder: Path) -> None:
        self.run, self.places, self.folder = run, places, folder
        (folder / "empty").mkdir()

    def __call__(
        self, name: str, mutations: list[str], export: Mapping[str, Any] | None, *more: object
    ) -> tuple[int, str]:
        _, table = read_tables(find_recipe(name))
        if export is not None:
            table["steps"].append({"use": "export", **({"format": export} if export else {})})
        (self.folder / "mutant.toml").write_text(tomli_w.dumps({**table, "name": "mutant"}))
        words = {"WHOLE": self.places[0]["whole"], "EMPTY": self.folder / "empty"}
        for word, place in words.items():
            mutations = [text.replace(word, str(place)) for text in mutations]
        stated = [*small(load(name), *self.places), *mutations]
        if not tomllib.loads((self.folder / "mutant.toml").read_text()).get("model"):
            stated = [text for text in stated if not text.startswith("model.")]
        arguments = [part for text in stated for part in ("--set", text)]
        done = self.run(self.folder / "mutant.toml", *arguments, *more)
        return done.code, done.err


@pytest.fixture
def tiny(
    llava_run: Command, weights: Mapping[str, Path], data: Path, pretrain: Path, science: Path,
    tmp_path: Path,
) -> Tiny:  # fmt: skip
    return Tiny(llava_run, (weights, data, pretrain, science), tmp_path)


# siglip is not the original's; pool is nobody's; features behind a norm are not transformers'
@example("small", [], {"use": "original"})
@example("llava7b", ['model.connector={ use = "pool", grid = 2 }'], {"use": "hf"})
@example("llava7b", ["model.vision.norm=true"], {"use": "hf"})
@example("llava7b", ["device=gpu0"], None)
@example("llava7b-lora", ["steps.2.init=@pretrain/best"], {})
@example("finetune-task", ["steps.1.skip=true"], {})
@example("finetune-task-lora", [], {"use": "hf"})
@given(st.sampled_from(RECIPES), MUTATIONS, st.sampled_from(FORMATS))
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_what_a_plan_accepts_runs(
    tiny: Tiny, name: str, mutations: list[str], export: Mapping[str, Any] | None
) -> None:
    code, err = tiny(name, mutations, export, "--plan")
    assert code in (0, 2), err
    out = tiny.folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    again, said = tiny(name, mutations, export, "--out", out)
    assert again == code, (err, said)
    if code == 2:
        assert not out.exists(), "it was refused after it had begun"
