"""Somebody else's package: built and installed by pip, used by name, tested by its contract."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import RecipeWriter

SOURCE = Path(__file__).parents[2] / "third_party" / "llava_mean"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the package on its path."""
    folder = tmp_path_factory.mktemp("third-party")
    source = shutil.copytree(SOURCE, folder / "source")  # building leaves files there
    site = folder / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, *options, str(source)], check=True)
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_plugin_takes_thirty_lines() -> None:
    assert len((SOURCE / "llava_mean.py").read_text().splitlines()) <= 30


def test_it_is_listed_with_its_package_and_version(installed: dict[str, str]) -> None:
    command = [sys.executable, "-m", "llavakit.cli", "plugins", "--json"]
    out = subprocess.run(command, env=installed, check=True, capture_output=True, text=True).stdout
    connectors = json.loads(out)["Connector"]
    assert {"name": "mean", "package": "llava-mean", "version": "0.3"} in connectors
    assert {item["package"] for item in connectors} == {"llava-mean", "llavakit"}


def test_a_recipe_of_two_stages_uses_it_by_name(
    installed: dict[str, str], write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    path = write_recipe(('use = "mlp"', 'use = "mean"'), ("epochs = 2", "max_steps = 2"))
    command = [sys.executable, "-m", "llavakit.cli", str(path), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'use = "mean"' in (tmp_path / "run" / "model" / "model.toml").read_text()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["visual_tokens"] == 1
    assert plan["parts"]["connector"] == {
        "component": "mean", "parameters": 33 * 48, "width": 48,
    }  # fmt: skip


def test_without_the_package_the_model_says_what_it_lacks(
    installed: dict[str, str], write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    path = write_recipe(('use = "mlp"', 'use = "mean"'))
    command = [sys.executable, "-m", "llavakit.cli", str(path), "--plan"]
    environment = {k: v for k, v in installed.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no Connector is called `mean`" in done.stderr


def test_its_own_tests_pass(installed: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(SOURCE / "tests" / "check_mean.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "check_mean.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 passed" in done.stdout


# -- commands and reports -------------------------------------------------------------------------


def run(installed: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llavakit.cli", *arguments]
    return subprocess.run(command, env=installed, capture_output=True, text=True, check=False)


def test_its_command_is_listed_and_runs_as_ours_do(
    installed: dict[str, str], tmp_path: Path
) -> None:
    assert "count the rows of a JSON list" in run(installed, "--help").stdout
    (tmp_path / "rows.json").write_text("[1, 2, 3]")
    done = run(installed, "count", str(tmp_path / "rows.json"))
    assert (done.returncode, done.stdout) == (0, "3\n")
    (tmp_path / "rows.json").write_text("{}")
    done = run(installed, "count", str(tmp_path / "rows.json"))
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'rows.json'} is no list; give one\n"
    assert "unrecognized arguments: --more" in run(installed, "count", "x", "--more").stderr


def test_a_command_that_cannot_be_imported_stops_no_other(installed: dict[str, str]) -> None:
    listed = run(installed, "--help")
    assert listed.returncode == 0
    assert "plugin `broken` of llava-mean failed to import" in " ".join(listed.stdout.split())
    done = run(installed, "broken")
    assert done.returncode == 2
    assert "No module named 'llava_mean_absent'; fix it or install it again (LLAVA_" in done.stderr
    assert "or uninstall it" in done.stderr
    assert run(installed, "recipes").returncode == 0


def test_its_report_reads_the_run_folder_as_ours_does(
    installed: dict[str, str], write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    trackers = 'trackers = [{ use = "ledger" }]'
    path = write_recipe(('name = "', f'{trackers}\nname = "'), ("epochs = 2", "max_steps = 2"))
    folder = tmp_path / "run"
    for event in ("done", "kept"):
        done = run(installed, str(path), "--out", str(folder), "--resume")
        assert done.returncode == 0, done.stderr
        lines = (folder / "ledger.txt").read_text().splitlines()
        assert [line.split()[1] for line in lines[-2:]] == [event] * 2
    assert not (folder / "report.html").exists()  # the recipe names its own trackers
