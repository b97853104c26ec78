"""The shape of the repository, and what its command costs before it does anything."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llavakit
from llavakit.contracts import hooks
from llavakit.registry import all_kinds

ROOT = Path(__file__).parents[2]

PROBE = """\
import json, resource, sys
from llavakit.cli import main
code = 0
try:
    code = main({arguments!r})
except SystemExit as error:
    code = error.code
used = resource.getrusage(resource.RUSAGE_SELF)
seconds = used.ru_utime + used.ru_stime
print(json.dumps([code, seconds, sorted(sys.modules)]), file=sys.stderr)
"""


def probe(*arguments: str) -> tuple[int, float, set[str], str]:
    """Run a command in a fresh process; return its code, CPU seconds, modules and output."""
    found = subprocess.run(
        [sys.executable, "-c", PROBE.format(arguments=list(arguments))],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    code, seconds, modules = json.loads(found.stderr.splitlines()[-1])
    return code, seconds, set(modules), found.stdout


def test_top_level_folders_are_source_roots_and_no_packages() -> None:
    # a `kernels/__init__.py` would shadow the PyPI package `kernels` that transformers imports
    for folder in ("core", "plugins", "kernels", "recipes"):
        assert (ROOT / folder).is_dir()
        assert not (ROOT / folder / "__init__.py").exists()


def test_every_kind_is_public() -> None:
    for kind in all_kinds():
        # what a package declares is imported from there
        own = hooks.OWN.get(kind.__name__)
        assert (own.load() if own else getattr(llavakit, kind.__name__)) is kind
        assert hooks.KINDS[kind.__name__][0] == kind.hook


def test_every_hook_has_a_kind_and_every_kind_a_hook() -> None:
    specified = {
        name
        for name, hook in inspect.getmembers(hooks, inspect.isfunction)
        if hasattr(hook, f"{hooks.PROJECT}_spec")
    }
    assert specified == {kind.hook for kind in all_kinds()}
    assert len(all_kinds()) == 12 + len(hooks.OWN)
    for name in specified:
        assert (inspect.getdoc(getattr(hooks, name)) or "").startswith("Return ")


def test_every_public_name_is_there() -> None:
    for name in llavakit.__all__:
        assert getattr(llavakit, name) is not None


def test_help_is_cheap() -> None:
    tries = [probe("--help") for _ in range(3)]
    code, _, modules, out = tries[0]
    assert code == 0
    assert "llava-run RECIPE" in out
    heavy = {"torch", "transformers", "numpy", "PIL", "pydantic", "pluggy", "rich", "matplotlib"}
    assert not heavy & modules
    assert min(seconds for _, seconds, _, _ in tries) < 0.4


def test_the_version_is_cheap() -> None:
    code, _, modules, out = probe("--version")
    assert code == 0
    assert out.startswith("llava-run ")
    assert "torch" not in modules


def test_data_is_checked_without_torch(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red ."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    code, _, modules, out = probe("check-data", str(tmp_path / "rows.json"), "--json")
    assert json.loads(out)["samples"] == 1
    assert code == 0
    assert not {"torch", "transformers"} & modules


@pytest.mark.parametrize("recipe", ["tiny", "llava13b"])
def test_recipes_are_planned_without_torch(recipe: str) -> None:
    code, _, modules, out = probe(recipe, "--plan")
    assert code == 0
    assert "finetune" in out
    assert not {"torch", "transformers"} & modules


def test_built_in_components_are_listed_without_torch() -> None:
    code, _, modules, out = probe("plugins", "--json")
    listed = json.loads(out)
    assert code == 0
    assert list(listed)[: len(hooks.KINDS)] == list(hooks.KINDS)
    others = {item["package"] for items in listed.values() for item in items} - {"llavakit"}
    if not others:  # those of others are imported, so that what is broken is named
        assert not {"torch", "transformers"} & modules


def test_asking_for_one_component_imports_one() -> None:
    program = (
        "import sys; from llavakit import Registry, VisionEncoder;"
        "Registry.installed().get(VisionEncoder, 'clip');"
        "print(*(n for n in sys.modules if n.startswith(('timm', 'llavakit_plugins.vision.'))))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules = set(found.stdout.split())
    assert "llavakit_plugins.vision.clip" in modules
    assert not {"timm", "llavakit_plugins.vision.timm", "llavakit_plugins.vision.siglip"} & modules
