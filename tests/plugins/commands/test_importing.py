"""A program imports a model's parts without looking for cycles, and goes on as any other."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.plugins.onnx_models import make_model, make_pictures

from llavakit import save_model
from llavakit.cli import main

PROGRAM = """\
import gc, json, sys
from llavakit.cli import main
code = main()
print(json.dumps([code, gc.isenabled(), gc.get_freeze_count(), "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("asked")
    save_model(make_model(), made / "model")
    make_pictures(made)
    return made


def question(folder: Path, model: str = "model") -> list[str]:
    asked = ["--prompt", "what ?", "--max-new-tokens", "3", "--device", "cpu"]
    return ["chat", str(folder / model), "--image", str(folder / "0.png"), *asked]


def run(arguments: list[str]) -> tuple[list[str], str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines(), done.stderr


def test_a_program_answers_the_same_and_freezes_what_it_imported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = gc.get_freeze_count()
    assert main(question(folder)) == 0
    assert gc.get_freeze_count() == before, "of a process that goes on, nothing is frozen"
    expected = capsys.readouterr().out
    (*answer, last), _ = run(question(folder))
    code, enabled, frozen, imported = json.loads(last)
    assert "\n".join(answer) == expected.strip()
    assert (code, enabled, imported) == (0, True, True)
    assert frozen > 100_000


@pytest.mark.parametrize("text", [None, "format = ", "format = 1\n[vision]\nuse = 'clippy'\n"])
def test_what_is_wrong_with_a_folder_is_said_by_who_loads_it(
    folder: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken").mkdir(exist_ok=True)
    if text is not None:
        (folder / "broken" / "model.toml").write_text(text)
    assert main(question(folder, "broken")) == 2
    expected = capsys.readouterr().err
    (last,), said = run(question(folder, "broken"))
    assert said == expected
    code, enabled, *_ = json.loads(last)
    assert (code, enabled) == (2, True)


def test_a_run_freezes_what_it_imported_and_writes_the_same(folder: Path) -> None:
    recipe = folder / "small.toml"
    text = (Path(__file__).parents[3] / "recipes" / "tiny.toml").read_text()
    text = text[: text.index("# CLIP on images")]  # its model and its first step
    recipe.write_text(text.replace("8192", "16").replace("480", "8"))
    before = gc.get_freeze_count()
    assert main([str(recipe), "--out", str(folder / "inside")]) == 0
    assert gc.get_freeze_count() == before, "of a process that goes on, nothing is frozen"
    (*_, last), _ = run([str(recipe), "--out", str(folder / "outside")])
    code, enabled, frozen, imported = json.loads(last)
    assert (code, enabled, imported) == (0, True, True)
    assert frozen > 100_000
    plans = [
        json.loads((folder / side / "plan.json").read_text()) for side in ("inside", "outside")
    ]
    for plan in plans:
        del plan["tflops"]  # measured
    assert plans[0] == plans[1]


def test_a_run_without_a_model_imports_no_network(folder: Path) -> None:
    recipe = folder / "scenes.toml"
    recipe.write_text('name = "drawn"\n[[steps]]\nuse = "scenes"\ntrain = 16\ntest = 8\n')
    (*_, last), _ = run([str(recipe), "--out", str(folder / "drawn")])
    code, enabled, _, imported = json.loads(last)
    assert (code, enabled, imported) == (0, True, False)
