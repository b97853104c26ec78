"""`llava-run compare`: over folders as runs leave them, against arithmetic done by hand."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from tests.conftest import Command, RecipeWriter

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes the folder of a finished run."""

    def make(
        folder: str,
        name: str,
        seed: int,
        accuracy: float,
        paper: float | None = None,
        **change: Any,
    ) -> Path:
        run = tmp_path / folder
        recipe: dict[str, Any] = {
            "name": name,
            "seed": seed,
            "model": {"connector": {"use": "linear"}},
            "steps": [
                {"use": "pretrain", "epochs": 1, **change},
                {"use": "export", "skip": True},
                {"use": "evaluate"},
            ],
        }
        if paper is not None:
            recipe["paper"] = [{"table": "Table 8", "metric": "evaluate.accuracy", "value": paper}]
        for number, metrics in {
            1: {"loss": 1.5},
            3: {"accuracy": accuracy, "loss_x": 0.25},
        }.items():
            step = run / f"{number:02}-{'pretrain' if number == 1 else 'evaluate'}"
            step.mkdir(parents=True)
            (step / "artifact.json").write_text(json.dumps({"record": {}, "metrics": metrics}))
        (run / "recipe.toml").write_text(tomli_w.dumps(recipe))
        return run

    return make


def test_seeds_are_one_row_with_mean_and_deviation(make_run: MakeRun, llava_run: Command) -> None:
    runs = [make_run(f"a{seed}", "a", seed, value) for seed, value in enumerate((0.5, 0.7, 0.9))]
    runs.append(make_run("b", "b", 0, 0.25))
    code, out, _ = llava_run("compare", *runs)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["recipe", "seeds", "evaluate.accuracy", "evaluate.loss_x"]
    assert rows[2] == ["a", "3", "0.700", "±", "0.200", "0.250", "±", "0.000"]
    assert rows[3] == ["b", "1", "0.250", "0.250"]
    found = json.loads(llava_run("compare", *runs, "--json").out)
    accuracy = found["groups"][0]["metrics"]["evaluate.accuracy"]
    assert accuracy == {
        "mean": pytest.approx(0.7), "std": pytest.approx(0.2), "values": [0.5, 0.7, 0.9],
    }  # fmt: skip
    assert found["groups"][1]["metrics"]["evaluate.accuracy"]["std"] is None
    assert [run["seed"] for run in found["groups"][0]["runs"]] == [0, 1, 2]
    assert found["left_out"] == []


def test_the_paper_s_order_is_told_pair_by_pair(make_run: MakeRun, llava_run: Command) -> None:
    runs = []
    for name, values, paper in (
        ("full", (0.90, 0.91, 0.92), 90.92),
        ("last", (0.90, 0.92, 0.94), 89.96),  # better than full, but by less than the noise
        ("raw", (0.50, 0.51, 0.52), 85.81),
    ):
        runs += [make_run(f"{name}{s}", name, s, v, paper) for s, v in enumerate(values)]
    runs.append(make_run("other", "other", 0, 0.99))
    code, out, _ = llava_run("compare", *runs)
    assert code == 0
    assert "Table 8, evaluate.accuracy: 2 of 3 pairs are ordered as in the paper:" in out
    said = "not: full < last (ours 0.91 < 0.92, within the noise; paper 90.92 > 89.96)"
    assert said in out
    assert "85.81" in next(line for line in out.splitlines() if line.startswith("raw"))
    (order,) = json.loads(llava_run("compare", *runs, "--json").out)["orders"]
    told = {
        (pair["better"], pair["worse"]): (pair["agrees"], pair["clear"]) for pair in order["pairs"]
    }
    assert told == {
        ("full", "last"): (False, False),
        ("full", "raw"): (True, True),
        ("last", "raw"): (True, True),
    }


def test_recipes_of_one_name_that_differ_stay_apart(make_run: MakeRun, llava_run: Command) -> None:
    runs = [
        make_run("a", "tiny", 0, 0.5),
        make_run("b", "tiny", 1, 0.6, epochs=4),
        make_run("c", "tiny", 2, 0.7),
    ]
    found = json.loads(llava_run("compare", *runs, "--json").out)
    assert [group["recipe"] for group in found["groups"]] == ["tiny", "tiny (steps.1.epochs=4)"]
    assert [len(group["runs"]) for group in found["groups"]] == [2, 1]


def test_what_cannot_be_compared_is_named(
    make_run: MakeRun, llava_run: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    good = make_run("good", "a", 0, 0.5)
    twin = make_run("twin", "a", 0, 0.5)
    unfinished = make_run("unfinished", "a", 1, 0.9)
    (unfinished / "03-evaluate" / "artifact.json").unlink()
    torn = make_run("torn", "a", 2, 0.9)
    (torn / "recipe.toml").write_text("name = ")
    damaged = make_run("damaged", "a", 3, 0.9)
    (damaged / "03-evaluate" / "artifact.json").write_text('{"metrics": {"accuracy": "high"}}')
    (tmp_path / "empty").mkdir()
    folders = [good, twin, unfinished, torn, damaged, tmp_path / "empty", tmp_path / "absent"]
    code, out, _ = llava_run("compare", *folders)
    assert code == 0
    left = [line for line in out.splitlines() if line.startswith("left out: ")]
    for folder, reason in (
        (twin, "repeats"),
        (unfinished, "is unfinished: 03-evaluate is not done"),
        (torn / "recipe.toml", "is damaged"),
        (damaged / "03-evaluate" / "artifact.json", "is damaged"),
        (tmp_path / "empty", "is no run"),
        (tmp_path / "absent", "is no run"),
    ):
        assert sum(f"{folder} {reason}" in line for line in left) == 1, reason
    assert len(left) == 6
    assert "a 1 0.500 0.250" in " ".join(out.split())
    text = refused("compare", *folders[2:])
    assert "there is no finished run to compare" in text
    assert f"{unfinished} is unfinished" in text


def test_metrics_can_be_chosen(
    make_run: MakeRun, llava_run: Command, refused: Callable[..., str]
) -> None:
    run = make_run("a", "a", 0, 0.5)
    chosen = llava_run("compare", run, "--metric", "*.loss*").out.splitlines()[0].split()
    assert chosen == ["recipe", "seeds", "pretrain.loss", "evaluate.loss_x"]
    text = refused("compare", run, "--metric", "acuracy")
    assert "no run has a metric like acuracy; there are: pretrain.loss, evaluate.accuracy" in text


@pytest.fixture
def make_steps(tmp_path: Path) -> MakeRun:
    """A function that writes a finished run of these steps; all but `export` have a loss."""

    def make(name: str, *steps: str) -> Path:
        run = tmp_path / name
        for number, use in enumerate(steps, 1):
            step = run / f"{number:02}-{use}"
            step.mkdir(parents=True)
            metrics = {} if use == "export" else {"loss": number / 2}
            text = json.dumps({"record": {}, "metrics": metrics})
            (step / "artifact.json").write_text(text)
        recipe = {"name": name, "seed": 0, "steps": [{"use": use} for use in steps]}
        (run / "recipe.toml").write_text(tomli_w.dumps(recipe))
        return run

    return make


@pytest.mark.parametrize(
    ("others", "shown", "said"),
    [
        # (each recipe's steps), the columns, what is said of them
        (
            [("pretrain", "finetune"), ("pretrain", "finetune", "prefer")],
            {"a": {"finetune.loss"}, "b": {"finetune.loss"}},
            ["`finetune` is shown, the last step that all recipes have",
             "--metric NAME shows others; there are: pretrain.loss, prefer.loss"],
        ),
        (
            [("pretrain", "finetune", "prefer"), ("pretrain", "finetune")],
            {"a": {"finetune.loss"}, "b": {"finetune.loss"}},
            ["`finetune` is shown, the last step that all recipes have",
             "--metric NAME shows others; there are: pretrain.loss, prefer.loss"],
        ),
        (
            [("pretrain",), ("finetune", "prefer")],
            {"a": {"pretrain.loss"}, "b": {"prefer.loss"}},
            ["no step is in all recipes: the last of each is shown",
             "--metric NAME shows others; there are: finetune.loss"],
        ),
        (
            [("pretrain",), ("finetune",)],
            {"a": {"pretrain.loss"}, "b": {"finetune.loss"}},
            [],
        ),
        (
            [("finetune",), ("finetune", "evaluate")],
            {"a": set(), "b": {"evaluate.loss"}},
            ["nothing that is shown was measured by a",
             "--metric NAME shows others; there are: finetune.loss"],
        ),
        ([("export",), ("finetune",)], {"a": set(), "b": {"finetune.loss"}},
         ["nothing that is shown was measured by a"]),
    ],
)  # fmt: skip
def test_recipes_of_other_steps_are_compared_by_what_they_share(
    others: list[tuple[str, ...]],
    shown: dict[str, set[str]],
    said: list[str],
    make_steps: MakeRun,
    llava_run: Command,
    tmp_path: Path,
) -> None:
    runs = [make_steps(name, *steps) for name, steps in zip("ab", others, strict=True)]
    found = json.loads(llava_run("compare", *runs, "--json").out)
    assert {g["recipe"]: {*g["metrics"]} for g in found["groups"]} == shown
    assert found["notes"] == said
    page = tmp_path / "page.html"
    out = llava_run("compare", *runs, "--html", page).out
    assert [line for line in out.splitlines() if line.startswith("note: ")] == [
        f"note: {sentence}" for sentence in said
    ]
    assert all(sentence in page.read_text() for sentence in said)
    # who chose the metrics knows what else there is
    assert "note: " not in llava_run("compare", *runs, "--metric", "finetune.*").out


def test_a_page_and_a_table_are_written(
    make_run: MakeRun, llava_run: Command, tmp_path: Path
) -> None:
    runs = [
        make_run("a", "<b>full</b>", 0, 0.5, 85.1),
        make_run("b", "alone", 0, 0.6, 73.8),
        tmp_path / "absent",
    ]
    page, table = tmp_path / "compare.html", tmp_path / "compare.csv"
    assert llava_run("compare", *runs, "--html", page, "--csv", table).code == 0
    html = page.read_text()
    assert "&lt;b&gt;full&lt;/b&gt;" in html
    assert "<b>full" not in html
    assert "0 of 1 pairs are ordered as in the paper" in html
    assert "absent is no run" in html
    assert "85.1" in html
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert rows[0]["recipe"] == "<b>full</b>"
    assert float(rows[0]["evaluate.accuracy mean"]) == 0.5
    assert rows[0]["evaluate.accuracy std"] == ""
    assert [float(row["evaluate.accuracy paper"]) for row in rows] == [85.1, 73.8]
    assert len(rows) == 2


def test_real_runs_compare(write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path) -> None:
    """The folders of the engine itself, with a figure of the paper in the recipe."""
    figure = '{ table = "T", metric = "pretrain.loss", value = 1.0 }'
    change = ("[model]", f"paper = [{figure}]\n\n[model]")
    out = [tmp_path / f"run-{seed}" for seed in range(2)]
    for seed, folder in enumerate(out):
        path = write_recipe(change, seed=seed)
        assert llava_run(path, "--out", folder, "--set", "steps.2.skip=true").code == 0
    losses = [
        json.loads((folder / "01-pretrain" / "artifact.json").read_text())["metrics"]["loss"]
        for folder in out
    ]
    (group,) = json.loads(llava_run("compare", *out, "--json").out)["groups"]
    assert group["recipe"] == "small"
    assert group["metrics"]["pretrain.loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert group["paper"] == {"pretrain.loss": {"table": "T", "value": 1.0}}


def test_comparing_needs_no_torch(make_run: MakeRun) -> None:
    program = (
        "import sys; from llavakit.cli import main; main(sys.argv[1:]);"
        "sys.exit('torch' in sys.modules)"
    )
    run = make_run("a", "a", 0, 0.5)
    assert subprocess.run([sys.executable, "-c", program, "compare", str(run)]).returncode == 0
