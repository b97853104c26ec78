"""The ablations in miniature: each changes a little of one recipe, and shares the rest of it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Command

from llavakit import Recipe, Registry
from llavakit.recipe.recipe import read_tables, recipe_folder

ABLATIONS = recipe_folder() / "ablations"
NAMES = sorted(path.stem for path in ABLATIONS.glob("*.toml"))

TABLE_4 = {"full": 85.1, "detail-reasoning": 81.9, "mostly-conversation": 80.5,
           "conversation": 73.8, "untuned": 21.5}  # fmt: skip
TABLE_8 = {"full": 90.92, "last-layer": 89.96, "answer-first": 89.77, "no-pretrain": 85.81,
           "smaller-language": 89.84}  # fmt: skip

SMALL = {  # enough to go through every step in seconds
    "scenes": ["train=64", "test=16"],
    "backbones": [
        "contrastive.steps=3", "contrastive.batch_size=16", "text.steps=3", "text.batch_size=4",
    ],
    "pretrain": ["max_steps=2", "batch_size=8"],
    "finetune": ["max_steps=2", "batch_size=8"],
    "evaluate": ["max_new_tokens=2", "blind=false"],
    "export": ["count=1", "max_new_tokens=2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    registry = Registry.installed()
    return {name: Recipe.load(ABLATIONS / f"{name}.toml", registry) for name in NAMES}


def test_all_that_the_issue_asks_for_are_there() -> None:
    assert {
        "full", "no-pretrain", "last-layer", "conversation", "detail-reasoning", "untuned",
        "answer-first", "smaller-language", "one-epoch", "two-epochs", "four-epochs",
    } <= set(NAMES)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_builds_on_tiny_and_changes_a_line_or_two(name: str) -> None:
    sources, _ = read_tables(ABLATIONS / f"{name}.toml")
    assert sources[-1].path.name == "tiny.toml"
    table = tomllib.loads((ABLATIONS / f"{name}.toml").read_text())
    assert table["name"] == name
    changes = {key for key in table if key not in ("base", "name", "paper")}
    assert len(changes) == 1
    assert "paper" in table or name == "full"  # or it would have the figures of its base


def test_the_figures_are_the_paper_s(recipes: dict[str, Recipe]) -> None:
    def figures(table: str) -> dict[str, float]:
        return {
            name: item.value
            for name, recipe in recipes.items()
            for item in recipe.paper
            if item.table == table
        }

    assert figures("Table 4") == TABLE_4
    exact = {name: value for name, value in TABLE_8.items() if name != "answer-first"}
    assert figures("Table 8") == exact
    assert figures("Table 8, by result") == TABLE_8


@pytest.mark.slow
def test_they_run_share_steps_and_compare(llava_run: Command, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    for name in ("full", "conversation", "untuned"):
        sets = [
            part
            for step, options in SMALL.items()
            if (name, step) != ("untuned", "finetune")
            for option in options
            for part in ("--set", f"steps.{step}.{option}")
        ]
        reuse = ["--reuse", runs] if name != "full" else []
        code, _, err = llava_run(f"ablations/{name}", "--out", runs / name, *reuse, *sets)
        assert code == 0, err
        shared = {"full": 0, "conversation": 4, "untuned": 4}[name]
        assert err.count(": taken from ") == shared
    code, out, err = llava_run("compare", *runs.iterdir(), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {group["recipe"] for group in found["groups"]} == {"full", "conversation", "untuned"}
    orders = {order["table"]: len(order["pairs"]) for order in found["orders"]}
    assert orders["Table 4"] == 3
    for group in found["groups"]:
        assert (
            group["paper"]["evaluate.facts_sighted_relative"]["value"] == TABLE_4[group["recipe"]]
        )
        assert 0 <= group["metrics"]["evaluate.facts_sighted_relative"]["mean"] <= 100


def test_an_unknown_ablation_is_named(refused: Callable[..., str]) -> None:
    assert "did you mean `ablations/conversation`?" in refused("ablations/conversatoin")
