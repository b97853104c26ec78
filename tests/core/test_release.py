"""What is published: the package's own description, its wheel without the source, the rest."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

import llavakit

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"llavakit", "llavakit_plugins", "llavakit_kernels"}
LIBRARIES = {  # of modules whose library may be absent here
    "flash_attn": "flash-attn", "liger_kernel": "liger-kernel", "lmms_eval": "lmms-eval",
    "mlflow": "mlflow-skinny", "onnxruntime": "onnxruntime", "spacy": "spacy",
    "tensorboard": "tensorboard", "trackio": "trackio", "triton": "triton", "wandb": "wandb",
}  # fmt: skip
BORROWED = {
    "flash_attn": "built by hand for a GPU; attention does without it",
    "pydantic_core": "a part of pydantic, which pins its version",
    "tqdm": "comes with lmms-eval, whose adapter shows lmms-eval's own bar",
}


def imports() -> Iterator[tuple[str, Path]]:
    """Yield every module of others that the source imports, wherever in a file."""
    for root in ("core", "plugins", "kernels"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                for name in names:
                    top = name.partition(".")[0]
                    if top not in OURS and top not in sys.stdlib_module_names:
                        yield top, path


def test_every_library_that_is_imported_is_declared() -> None:
    named = [*PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        named += extra
    declared = {plain(re.split(r"[\[<>=;!~ ]", line)[0]) for line in named}
    known = packages_distributions()
    undeclared = {
        f"{module} in {path.relative_to(ROOT)}"
        for module, path in imports()
        if module not in BORROWED
        and not {plain(name) for name in known.get(module, ())} & declared
        and plain(LIBRARIES.get(module, module)) not in declared
    }
    assert not undeclared


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_version_is_said_once_and_is_the_citation_s() -> None:
    assert "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", llavakit.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == llavakit.__version__
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license", "references"} <= set(citation)


def test_the_readme_renders_on_an_index_and_its_links_lead_somewhere() -> None:
    markdown = pytest.importorskip("readme_renderer.markdown", reason="readme-renderer is absent")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    html = markdown.render(text)
    assert html, "an index would show it as plain text"
    targets = re.findall(r'(?:href|src)="([^"]+)"', html)
    repository = PROJECT["urls"]["Source"]
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    assert len(targets) > 10
    for target in targets:
        assert target.startswith(("https://", "#")), f"{target} leads nowhere from an index"
        for prefix in (f"{repository}/blob/main/", raw):
            if target.startswith(prefix):
                assert (ROOT / target.removeprefix(prefix)).exists(), target


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that is built of it alone."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is absent")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, env=environment)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        extract: Any = file.extractall
        # a Python 3.11 of before 3.11.4 has no filters
        extract(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = folder / archive.name.removesuffix(".tar.gz")
    subprocess.run([*build, "-t", "wheel"], cwd=source, check=True, env=environment)
    return folder


def test_the_wheel_holds_the_source_the_recipes_and_what_an_index_shows(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        described = file.read(metadata).decode()
    tracked = subprocess.run(
        ["git", "ls-files", "core", "plugins", "kernels", "recipes"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for name in tracked:
        inside = re.sub(r"^(core|plugins|kernels)/|^(?=recipes/)", "", name)
        inside = f"llavakit/{inside}" if inside.startswith("recipes/") else inside
        assert inside in names or not (ROOT / name).exists(), name
    assert not [name for name in names if name.endswith(".pyc") or name.startswith("tests")]
    assert f"Version: {llavakit.__version__}\n" in described
    assert "Project-URL: Source, https://" in described
    assert "Classifier: Typing :: Typed" in described
    assert "License-Expression: Apache-2.0" in described


def test_the_wheel_runs_without_the_source(dist: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows the libraries of this one, and not llavakit."""
    (wheel,) = dist.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "alone"], check=True)
    python = tmp_path / "alone" / "bin" / "python"
    site = next((tmp_path / "alone").glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    borrowed = [path for path in sys.path if path.endswith("-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))

    def run(*arguments: str) -> str:
        done = subprocess.run(
            arguments, cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**clean(os.environ), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = str(python.with_name("llava-run"))
    where = run(str(python), "-c", "import llavakit; print(llavakit.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert "tiny" in run(command, "recipes").split()
    assert "finetune" in run(command, "tiny", "--plan")
    assert run(command, "--version") == f"llava-run {llavakit.__version__}\n"


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what would bring the source back."""
    return {k: v for k, v in environment.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_workflows_call_what_is_there(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    table = yaml.safe_load(text)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert table["permissions"] == {"contents": "read"}
    for job in table["jobs"].values():
        assert job["runs-on"]
        assert 0 < job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
            for path in re.findall(r"\btests/\S+", step.get("run", "")):
                assert (ROOT / path).exists(), path
    assert not re.search(r"https?://", text), "a workflow names no host"


@pytest.mark.parametrize("name", ["bug.yml", "idea.yml"])
def test_forms_of_issues_are_valid(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(field["attributes"]["label"] for field in form["body"])


def test_the_image_does_not_run_as_root_and_gets_what_the_wheel_is_built_of() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)
    targets = {stage.split("\n")[0].rpartition(" AS ")[2]: stage for stage in stages[1:]}
    for target in ("cpu", "cuda"):
        users = re.findall(r"^USER (\w+)$", targets[target], re.MULTILINE)
        assert users[-1:] == ["llava"], target
    assert not re.search(r"^(ENV|ARG).*(TOKEN|KEY|SECRET|PASSWORD)", text, re.MULTILINE)
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert "*" in ignore
    needed = {"core/", "plugins/", "kernels/", "recipes/", "pyproject.toml", "README.md", "LICENSE"}
    assert {line[1:] for line in ignore if line.startswith("!")} == needed
