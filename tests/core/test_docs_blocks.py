"""What the pages show works as it stands there: commands, recipes, data, code and links.

A block that needs something no test has says so in a comment above it, `<!-- needs ... -->`; one
that another test runs names that test.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import unquote

import pytest
from tests.conftest import Command

import llavakit
from llavakit import Recipe, RecipeError, Registry
from llavakit.contracts.commands import GROUP
from llavakit.recipe.recipe import find_recipe
from llavakit.testing import make_picture, run_recipe, small_recipe
from llavakit_plugins.commands import run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A piece of a page."""

    page: Path
    line: int
    language: str  #: `text` of what stands indented.
    text: str
    above: str  #: The comment above it.

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def marked(self) -> bool:
        """Whether it says what it needs, or which test runs it. That must be there."""
        if named := re.search(r"tests/[\w/.]+", self.above):
            assert (ROOT / named[0]).is_file(), f"{self}: {named[0]} is not there"
            return not named[0].endswith(Path(__file__).name)
        return "needs" in self.above


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, and what stands indented by four spaces."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        line, above = lines[number], lines[number - 1] if number else ""
        comment = above if above.startswith("<!--") else ""
        if fence := re.match(r"```(\S*)$", line):
            end = next(n for n in range(number + 1, len(lines)) if lines[n] == "```")
            yield Block(page, number + 1, fence[1], "\n".join(lines[number + 1 : end]), comment)
            number = end
        elif line.startswith("    ") and not above.strip():
            end = next((n for n in range(number, len(lines)) if lines[n][:1].strip()), len(lines))
            text = "\n".join(part.removeprefix("    ") for part in lines[number:end])
            yield Block(page, number + 1, "text", text, comment)
            number = end - 1
        number += 1


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def commands_in(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of `llava-run`, one of each way that brackets leave open."""
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        plain = re.sub(r"[\[\]]", "", line) if re.search(r"\[--?\w", line) else line
        if not re.search(r"(^|[/ ])llava-run\b", plain.partition("#")[0]):
            continue
        plain = re.sub(r'"\$\(command -v llava-run\)"', "llava-run", plain)
        words = shlex.split(plain.partition(" > ")[0], comments=True)
        words = [word.partition("|")[0] if "|" in word else word for word in words]
        begin = next((n for n, w in enumerate(words) if w.endswith("llava-run")), None)
        if begin is not None:
            yield words[begin + 1 :]


COMMANDS = [
    pytest.param(words, id=f"{block} {' '.join(words)[:40]}")
    for block in of("text", "sh", "bash", "console")
    if not block.marked
    for words in commands_in(block)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_understood(words: list[str], llava_run: Command) -> None:
    installed = entry_points(group=GROUP)
    parser = argparse.ArgumentParser(exit_on_error=False)
    commands = parser.add_subparsers()
    recipe = words[0] not in installed.names
    if recipe:
        run.add(commands)
        words = ["run", *words]
    else:
        (point,) = installed.select(name=words[0])
        point.load()(commands)
    known, rest = parser.parse_known_args(words)
    assert not rest or getattr(known, "reads_flags", False), rest
    if not recipe:
        if words in (["recipes"], ["plugins"]):
            assert llava_run(*words).code == 0
        return
    own = known.recipe.endswith(".toml") and not known.recipe.startswith("recipes/")
    name = "tiny" if own else known.recipe  # a recipe of the reader's: it may change as ours do
    path = find_recipe(str(ROOT / name) if name.startswith("recipes/") else name)
    Recipe.load(path, Registry.installed(), known.set)
    if known.plan and not own:
        assert llava_run(*words[1:]).code == 0


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_recipes_are_valid(block: Block, tmp_path: Path) -> None:
    table = tomllib.loads(block.text)
    if block.marked or "project" in table:
        groups = table.get("project", {}).get("entry-points", {})
        assert all(name.startswith("llavakit") for name in groups)
        return
    steps = table.get("steps", [])
    text = block.text
    tiny = Recipe.load(find_recipe("tiny"), Registry.installed())
    known = {*Recipe.model_fields, "base"}
    rest = isinstance(steps, dict) and not set(steps) <= {step.use for step in tiny.steps}
    if rest or not set(table) <= known:
        text = f'[[steps]]\nuse = "finetune"\n{text}'  # the rest of a step that begins elsewhere
    elif not isinstance(steps, list) or not steps:
        text = text if "base" in table else f'base = "tiny"\n{text}'
    path = tmp_path / "page.toml"
    path.write_text(text, encoding="utf-8")
    try:
        Recipe.load(path, Registry.installed())
    except RecipeError as error:  # a page shows what matters, and may leave the rest out
        wrong = [part for part in str(error).split("\n\n") if "missing option" not in part]
        assert not wrong, f"{block}: {wrong}"


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_data_are_json(block: Block) -> None:
    assert json.loads(block.text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages speak of: a model, pictures, data."""
    folder = tmp_path_factory.mktemp("docs")
    base = small_recipe(folder / "small").as_posix()
    skip = "".join(f"steps.{step}.skip = true\n" for step in ("finetune", "evaluate"))
    made = run_recipe(folder / "made", f"base = '{base}'\n{skip}")
    (folder / "runs").mkdir()
    made.rename(folder / "runs" / "tiny")
    for name in ("photo.jpg", "scene.png"):
        make_picture().save(folder / name)
    return folder


CODE = {page: [block for block in of("python") if block.page == page] for page in PAGES}


@pytest.mark.parametrize("page", [page for page in PAGES if CODE[page]], ids=lambda page: page.name)
def test_code_runs(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after another: what one makes, those behind it know."""
    monkeypatch.chdir(place)
    module = ModuleType("page")
    module.__dict__.update({name: getattr(llavakit, name) for name in llavakit.__all__})
    for block in CODE[page]:
        program = compile(block.text, str(block), "exec")
        if not block.marked:
            exec(program, module.__dict__)


def test_extras_and_targets_that_pages_name_are_there() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = table["project"]
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"--group ([a-z]+)", targets)) <= set(table["dependency-groups"])
    for block in BLOCKS:
        for extras in re.findall(r"llavakit\[([\w,-]+)\]", block.text):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), str(block)
        for target in re.findall(r"^make ([a-z-]+)", block.text, flags=re.M):
            assert re.search(rf"^{target}:", targets, flags=re.M), str(block)


def test_links_to_files_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path = unquote(link.partition("#")[0])
            if path and "://" not in path:
                assert (page.parent / path).exists(), f"{page.name}: {link}"


def test_the_reference_has_every_contract() -> None:
    shown = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    folder = ROOT / "core" / "llavakit" / "contracts"
    for module in sorted(folder.glob("[a-z]*.py")):
        assert f"automodule:: llavakit.contracts.{module.stem}\n" in shown
