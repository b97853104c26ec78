"""Weights of a mixture that nothing sensible can be drawn by are refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from llavakit import DataError, Dataset, Registry, Use

TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A square."}]


def mixed(folder: Path, weights: list[float]) -> Dataset:
    path = folder / "rows.json"
    path.write_text(json.dumps([{"id": str(n), "conversations": TURNS} for n in range(7)]))
    part = {"use": "conversations", "path": str(path)}
    use = Use[Dataset].model_validate({"use": "mix", "parts": [part, part], "weights": weights})
    return Registry.installed().build(use)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([float("nan"), 1.0], "finite number"),
        ([float("inf"), 1.0], "finite number"),
        ([1e9, 1.0], "`weights` are up to 1,000; make more `epochs` of the data"),
        ([0.0, 1.0], "`weights` are above 0; leave a part out that is not wanted"),
        ([1.0], "give `weights` one number for each of 2 parts"),
    ],
)
def test_weights_that_cannot_be_used(tmp_path: Path, weights: list[float], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        mixed(tmp_path, weights)


def test_a_part_of_which_nothing_is_left_is_named(tmp_path: Path) -> None:
    assert len(mixed(tmp_path, [1.0, 0.1])) == 8
    with pytest.raises(DataError, match=r"part 2 of `mix` is left out: 0\.05 times its 7 samples"):
        mixed(tmp_path, [1.0, 0.05])
