"""Tokenised data that no step of a run reads any more is removed, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RecipeWriter
from tests.core import processes
from tests.runs import run_in

from llavakit_plugins.training.tokenised_steps import note_read, settle

MODULE = "llavakit_plugins.training.tokenised_steps"


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[..., None]:
    """A function that does with the tokenised data of a step what an attempt at it does."""
    folder = tmp_path / "tokenised"
    folder.mkdir()

    def call(step: str, *keys: str, ends: bool = True) -> None:
        run, files = run_in(tmp_path / step), [folder / f"{key}.safetensors" for key in keys]
        for file in files:
            note_read(run, file, [])
            file.with_suffix(".blocks").mkdir(exist_ok=True)
            if ends:
                file.write_bytes(b"columns")
                file.with_suffix(".blocks").rmdir()
        if ends:
            settle(run, files)

    return call


def left(tmp_path: Path) -> list[str]:
    found = sorted(path.name for path in (tmp_path / "tokenised").iterdir())
    assert found.pop() == "steps.json"
    return found


def test_what_a_step_read_before_goes_unless_another_reads_it(
    tmp_path: Path, attempt: Callable[..., None]
) -> None:
    (tmp_path / "tokenised" / "0.safetensors").write_bytes(b"of an earlier version")
    attempt("01-pretrain", "a")
    attempt("02-finetune", "a", "b")
    assert left(tmp_path) == ["0.safetensors", "a.safetensors", "b.safetensors"]
    attempt("02-finetune", "c")  # the second reads other data now
    assert left(tmp_path) == ["0.safetensors", "a.safetensors", "c.safetensors"]
    attempt("01-pretrain", "d")
    assert left(tmp_path) == ["0.safetensors", "c.safetensors", "d.safetensors"]
    attempt("01-pretrain", "e", ends=False)  # killed while it tokenised
    assert left(tmp_path) == ["0.safetensors", "c.safetensors", "d.safetensors", "e.blocks"]
    attempt("01-pretrain", "f")
    assert left(tmp_path) == ["0.safetensors", "c.safetensors", "f.safetensors"]


def test_what_a_step_read_that_the_recipe_has_no_more_goes(
    tmp_path: Path, attempt: Callable[..., None]
) -> None:
    attempt("01-pretrain", "a")
    attempt("02-finetune", "b")
    (tmp_path / "plan.json").write_text(json.dumps({"steps": {"01-pretrain": {}, "02-prefer": {}}}))
    attempt("01-pretrain", "a")
    assert left(tmp_path) == ["a.safetensors"]


def test_a_kill_leaves_what_the_next_attempt_removes(
    tmp_path: Path, attempt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = run_in(tmp_path / "01-pretrain"), tmp_path / "tokenised" / "b.safetensors"
    attempt("01-pretrain", "a")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for what, there in (("shutil.rmtree", True), (f"{MODULE}.write_text", False)):
        attempt("01-pretrain", "b", ends=False)
        with monkeypatch.context() as patch:
            patch.setattr(what, killed)  # before the first removal, and behind the last
            with pytest.raises(KeyboardInterrupt):
                settle(run, [file])
        assert ("a.safetensors" in left(tmp_path)) is there
    attempt("01-pretrain", "b")
    assert left(tmp_path) == ["b.safetensors"]
    table = json.loads((tmp_path / "tokenised" / "steps.json").read_text())
    assert table == {"01-pretrain": {"settled": ["b"], "stamps": {"b": []}}}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"x": "a"}', '{"x": {"stamps": ["a"]}}',
        '{"x": {"settled": ["../../rows"], "stamps": {"../../rows": []}}}',
    ],
)  # fmt: skip
def test_a_table_that_is_not_ours_removes_nothing(
    tmp_path: Path, attempt: Callable[..., None], text: str
) -> None:
    (tmp_path.parent / "rows.safetensors").write_bytes(b"")
    (tmp_path / "tokenised" / "a.safetensors").write_bytes(b"")
    (tmp_path / "tokenised" / "steps.json").write_text(text)
    attempt("x", "b")
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]
    assert (tmp_path.parent / "rows.safetensors").exists()


def test_a_run_whose_data_changes_leaves_no_old_file(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    recipe, out = write_recipe(("epochs = 2", "max_steps = 1")), tmp_path / "run"
    kept: list[set[Path]] = []
    for length in (64, 64, 60):
        sets = [f"steps.{step}.max_length={length}" for step in ("pretrain", "finetune")]
        again = [part for text in sets for part in ("--set", text)]
        assert processes.run_ranks(tmp_path, 2, recipe, "--out", out, "--resume", *again).code == 0
        kept.append(set((out / "tokenised").glob("*.safetensors")))
    assert kept[0] == kept[1]
    assert not kept[0] & kept[2]
    assert len(kept[0]) == len(kept[2]) > 0
