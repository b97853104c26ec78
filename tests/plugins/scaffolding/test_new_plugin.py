"""`llava-run new-plugin`: what it writes passes its own tests and linters, where it is new."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Command

from llavakit.registry import all_kinds
from llavakit_plugins.scaffolding.package import known_kinds, new_package

ROOT = Path(__file__).parents[3]


def python(folder: Path) -> Path:
    """Return the interpreter of an environment."""
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def do(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A package of every kind, and the interpreter of a new environment that has it."""
    folder = tmp_path_factory.mktemp("new-plugin")
    package = folder / "llava-fine"
    new_package("llava-fine", list(known_kinds()), package)
    venv.create(folder / "venv", symlinks=os.name != "nt")
    fresh = python(folder / "venv")
    paths = sysconfig.get_paths(vars=dict.fromkeys(("base", "platbase"), str(folder / "venv")))
    # torch and the like are borrowed, not installed again: lines of .pth files there count, too
    borrowed = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(paths["purelib"]) / "borrowed.pth").write_text(borrowed)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--editable", "."]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", fresh]
    done = do(*pip, "install", *options, folder=package)
    assert done.returncode == 0, done.stderr
    return package, fresh


def test_every_kind_of_the_registry_can_be_made() -> None:
    assert [kind for kind in known_kinds().values() if kind] == list(all_kinds())
    assert {"vision-encoder", "chat-model", "tracker", "command"} <= set(known_kinds())


@pytest.mark.parametrize("kind", known_kinds())
def test_a_package_of_one_kind_is_whole(kind: str, tmp_path: Path) -> None:
    files = new_package("llava-fine", [kind], tmp_path / "out")
    assert all(file.is_file() for file in files)
    names = {file.relative_to(tmp_path / "out").as_posix() for file in files}
    own = kind.replace("-", "_")
    module = "recipes/fine.toml" if kind == "recipe" else f"{own}.py"
    assert {
        f"src/llava_fine/{module}", f"tests/test_{own}.py", "pyproject.toml", "README.md",
        ".github/workflows/check.yml", "src/llava_fine/py.typed", ".gitignore",
    } <= names  # fmt: skip
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "`fine`" in readme or "llava-run fine" in readme
    project = tomllib.loads((tmp_path / "out" / "pyproject.toml").read_text())
    groups = {f"llavakit.{kind}s"} if kind in ("command", "recipe") else {"llavakit"}
    assert set(project["project"]["entry-points"]) == groups


def test_its_tests_pass_and_each_component_runs_in_a_recipe(made: tuple[Path, Path]) -> None:
    package, fresh = made
    done = do(fresh, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", folder=package)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    for kind in known_kinds():
        own = kind.replace("-", "_")
        other = {"command": "it_counts", "recipe": "they_are_listed"}
        test = other.get(kind, "it_runs_in_a_recipe")
        assert f"PASSED tests/test_{own}.py::test_{test}" in done.stdout


def test_its_components_are_listed_with_its_version(made: tuple[Path, Path]) -> None:
    package, fresh = made
    done = do(fresh, "-m", "llavakit.cli", "plugins", "--json", folder=package)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    mine = {"name": "fine", "package": "llava-fine", "version": "0.1.0"}
    assert all(mine in listed[kind.__name__] for kind in all_kinds())
    assert "broken" not in listed


@pytest.mark.parametrize("name", ["a", "llava-fine", f"llava-{'long' * 6}"])
def test_ruff_finds_nothing_whatever_the_name(name: str, tmp_path: Path) -> None:
    new_package(name, list(known_kinds()), tmp_path / "out")
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        done = do(*ruff, folder=tmp_path / "out")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_finds_nothing(made: tuple[Path, Path]) -> None:
    package, fresh = made
    cache = ROOT / ".mypy_cache" / "new-plugin"  # kept: torch alone takes half a minute to read
    done = do(fresh, "-m", "mypy", "--cache-dir", cache, folder=package)
    assert done.returncode == 0, done.stdout + done.stderr


WRONG = """\
from llavakit import Connector, Options
from torch import Tensor, nn


def number(x: Tensor) -> int:
    return x + 1


class Bad(Connector):
    name = "bad"

    def forward(self, features_BPD: Tensor) -> str:
        return str(nn.Linear(1, "2"))


def make(options: Options) -> None:
    options.missing_field
"""


@pytest.mark.slow
def test_mypy_still_finds_what_an_author_gets_wrong(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    """Though most of torch is passed over: tensors, modules and the contracts are not."""
    package, fresh = made
    copy = shutil.copytree(package, tmp_path / "copy")
    (copy / "src" / "llava_fine" / "wrong.py").write_text(WRONG)
    cache = ROOT / ".mypy_cache" / "new-plugin"
    done = do(fresh, "-m", "mypy", "--cache-dir", cache, "src", folder=copy)
    found = re.findall(r"wrong\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout)
    assert found == [("6", "return-value"), ("12", "override"), ("13", "arg-type"),
                     ("17", "attr-defined")], done.stdout  # fmt: skip


# -- the command ----------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_what_to_do_next(
    llava_run: Command, tmp_path: Path
) -> None:
    kinds = ["--kind", "connector", "--kind", "Tracker", "--kind", "connector"]
    code, out, _ = llava_run("new-plugin", "llava-fine", *kinds, "--out", tmp_path / "out")
    assert code == 0
    assert str(tmp_path / "out" / "src" / "llava_fine" / "tracker.py") in out
    assert "pip install -e . --group dev" in out
    hooks = (tmp_path / "out" / "src" / "llava_fine" / "__init__.py").read_text()
    assert hooks.count("@hookimpl") == 2
    assert hooks.startswith('"""A connector and a tracker."""')


def test_all_is_one_of_each(llava_run: Command, tmp_path: Path) -> None:
    assert llava_run("new-plugin", "fine", "--kind", "all", "--out", tmp_path / "x").code == 0
    made = [*(tmp_path / "x" / "src" / "fine").glob("[a-z]*.py"), *tmp_path.rglob("fine.toml")]
    assert len(made) == len(known_kinds())


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("My Plugin", "connector", "`My Plugin` names no package; use lower-case letters"),
        ("../up", "connector", "llava-up"),
        ("a--b", "connector", "names no package"),
        ("x" * 41, "connector", "names no package"),
        ("llava-3d", "connector", "`3d` begins with a digit"),
        ("json", "connector", "`import json` means something else already"),
        ("class", "connector", "`import class` means something else already"),
        ("torch", "connector", "name the package llava-torch"),
        ("llavakit", "connector", "`import llavakit` means something else already"),
        ("llava-linear", "connector", "llavakit has a connector `linear` already"),
        ("llava-chat", "command", "llavakit has a command `chat` already"),
        ("llava-tiny", "recipe", "has a recipe `tiny` already"),
        ("llava-fine", "conector", "no kind `conector`; did you mean `connector`?"),
        ("llava-fine", "", "there is no kind ``"),
    ],
)
def test_what_cannot_be_made_is_said(
    refused: Callable[..., str], tmp_path: Path, name: str, kind: str, sentence: str
) -> None:
    said = refused("new-plugin", name, "--kind", kind, "--out", tmp_path / "out")
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_nothing_that_is_there_is_overwritten(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava-fine").mkdir()
    said = refused("new-plugin", "llava-fine", "--kind", "connector")
    assert said.startswith("llava-fine is there already; name another folder")
    assert not list((tmp_path / "llava-fine").iterdir())
