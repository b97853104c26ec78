"""An installation whose entry points are older than its files: a sentence says what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from PIL import Image

INSTALL = "the installation of llavakit is older than its files: install it again by pip\n"
MISSING = "error: no entry point of `{group}` is called `{name}`; " + INSTALL


def run(
    tmp_path: Path, pattern: str, instead: str, *command: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run llava-run where the metadata that is found first says something else of entry points."""
    text = distribution("llavakit").read_text("entry_points.txt")
    assert text is not None
    changed, count = re.subn(f"(?m)^{pattern}$", instead, text)
    assert count == 1
    info = tmp_path / "site" / "llavakit-0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llavakit\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text(changed)
    return subprocess.run(
        [sys.executable, "-m", "llavakit.cli", *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(info.parent), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_command_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, "run = .*", "", "tiny", "--plan")
    assert done.stderr == MISSING.format(name="run", group="llavakit.commands")
    assert done.returncode == 2


def test_the_reader_of_images_is_missing(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = tmp_path / "rows.json"
    turns = '{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}'
    rows.write_text(f'[{{"id": "a", "image": "a.png", "conversations": [{turns}]}}]')
    tiled = ("--images", tmp_path, "--tiling", "anyres")  # whose rows follow from an image's size
    done = run(tmp_path, "reader = .*", "", "check-data", rows, *tiled)
    assert done.stderr == MISSING.format(name="reader", group="llavakit.media")
    assert done.returncode == 2


def test_what_measures_a_machine_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, "tflops = .*", "", "tiny", "--plan")
    assert done.stderr.endswith(MISSING.format(name="tflops", group="llavakit.measures"))
    assert done.returncode == 2


def test_what_joins_processes_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = {"RANK": "0", "WORLD_SIZE": "1"}
    done = run(tmp_path, "torchrun = .*", "", "tiny", "--out", out, **started)
    assert done.stderr.endswith(MISSING.format(name="torchrun", group="llavakit.launchers"))
    assert done.returncode == 2


@pytest.mark.parametrize("name", ["names", "toml"])
def test_an_entry_point_names_a_module_that_is_gone(tmp_path: Path, name: str) -> None:
    recipe = tmp_path / "wrong.toml"
    recipe.write_text('steps = [{ use = "scenes", trian = 8 }]')
    done = run(tmp_path, f"{name} = .*", f"{name} = llavakit_plugins.gone:found", recipe)
    assert done.stderr == (
        f"error: plugin `{name}` of llavakit failed to import: No module named "
        "'llavakit_plugins.gone'; fix it or install it again (LLAVA_TRACEBACK=1 shows more), "
        "or uninstall it\n"
    )
    assert done.returncode == 2


def test_a_kind_that_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, "llava_objectives = .*", "", "tiny", "--plan")
    expected = f"error: no entry point of `llavakit.kinds` names Objective; {INSTALL}"
    assert done.stderr.endswith(expected)
    assert done.returncode == 2
