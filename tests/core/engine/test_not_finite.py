"""What a step reports that is no number, or no text, is in its record JSON that anything reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command

from llavakit import Curves, Outcome, Recipe, Registry, Run, Step, Table, hookimpl, run
from llavakit_plugins.reporting.run_folder import read_record


class Odd(Step):
    """Reports what is no number."""

    name = "odd"

    def run(self, run: Run) -> Outcome:
        values = {"loss": math.nan, "rate": math.inf, "seconds": 1.0, "right": 0.5}
        points = [(1.0, 2.0), (2.0, math.nan), (3.0, -math.inf)]
        curves = Curves(title="loss", x="step", y="loss", series={"all": points})
        rows: list[list[str | float | int | None]] = [[math.nan], ["half an emoji \ud83d, one 😀"]]
        return Outcome(values, [curves, Table(title="t", columns=["a"], rows=rows)])


def strict(text: str) -> Any:
    """Return what JSON holds; NaN and Infinity are none of it."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_records_and_comparisons_are_json(tmp_path: Path, llava_run: Command) -> None:
    class Plugin:
        @hookimpl
        def llava_steps(self) -> list[Any]:
            return [Odd]

    registry = Registry.installed()
    registry.register(Plugin())
    for seed in (0, 1):
        path = tmp_path / "r.toml"
        path.write_text(f'name = "odd"\nseed = {seed}\nsteps = [{{ use = "odd" }}]')
        run(Recipe.load(path, registry), registry, tmp_path / f"run{seed}")
    folder = tmp_path / "run0" / "01-odd"
    found = strict((folder / "artifact.json").read_text())
    assert found["metrics"] == {"loss": None, "rate": None, "seconds": 1.0, "right": 0.5}
    assert found["sections"][0]["series"] == {"all": [[1.0, 2.0], [2.0, None], [3.0, None]]}
    assert found["sections"][1]["rows"] == [[None], ["half an emoji \ufffd, one 😀"]]

    record = read_record(folder)
    assert math.isnan(record.metrics["loss"])
    curves = record.sections[0]
    assert isinstance(curves, Curves)
    assert [math.isnan(value) for _, value in curves.series["all"]] == [False, True, True]
    assert (tmp_path / "run0" / "report.html").is_file()  # by a tracker, which had read it

    # a record of before held the half as it came, and its run had no report
    record_file = folder / "artifact.json"
    written = record_file.read_text()
    record_file.write_text(written.replace("\ufffd", r"\ud83d, no half: \\ud83d"))
    table = read_record(folder).sections[1]
    assert isinstance(table, Table)
    assert table.rows[1] == ["half an emoji \ufffd, no half: \\ud83d, one 😀"]
    record_file.write_text(written)

    runs = [tmp_path / "run0", tmp_path / "run1"]
    code, out, _ = llava_run("compare", *runs, "--json")
    assert code == 0
    (group,) = strict(out)["groups"]
    assert group["metrics"]["odd.loss"] == {"mean": None, "std": None, "values": [None, None]}
    assert group["metrics"]["odd.right"] == {"mean": 0.5, "std": 0.0, "values": [0.5, 0.5]}
    code, out, _ = llava_run("compare", *runs)
    assert code == 0
    assert "nan ± nan" in out
