"""A new package for a plugin: files that work as they are, to be changed one by one."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from llavakit import (
    Component,
    PluginError,
    Registry,
    all_kinds,
    and_more,
    did_you_mean,
    new_folder,
    recipe_files,
)
from llavakit.contracts.commands import GROUP

COMMAND, RECIPE = "command", "recipe"  #: What has no kind of its own in the registry.
RECIPES = "llavakit.recipes"  #: The entry-point group of packages with recipes.
_LONGEST = 30
_COMMON = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "gitignore": ".gitignore",
    "check.yml": ".github/workflows/check.yml",
}


@cache
def known_kinds() -> dict[str, type[Component] | None]:
    """Return what a package can be made for: each kind, as `vision-encoder`; commands, recipes."""
    kinds = {_spelt(kind.__name__): kind for kind in all_kinds()}
    templates = Path(__file__).parent / "templates"  # another package's own kind has none
    kinds = {name: kind for name, kind in kinds.items() if (templates / name).is_dir()}
    return {**kinds, COMMAND: None, RECIPE: None}


@dataclass(frozen=True)
class _Part:
    """One component of the package."""

    kind: str
    module: str  #: Its file's name, without `.py`.
    component: str  #: Its class.


def new_package(project: str, kinds: Sequence[str], folder: Path) -> list[Path]:
    """Write a package with a component of each kind to `folder`; return its files.

    `project` is the package's name for pip; a `llava-` in front is left out of the components'
    name. Raises PluginError for names that are none or taken, kinds that there are not, and a
    folder that is there already.
    """
    kinds = tuple(dict.fromkeys(_known(kind) for kind in kinds))
    package, name = _names(project)
    _refuse_taken(name, kinds)
    if folder.exists():
        raise PluginError(f"{folder} is there already; name another folder, or remove that one")
    # short, whatever the name: lines keep their length, and so the linters' layout
    words = "".join(part.capitalize() for part in name.split("-"))[:12]
    parts = []
    for kind in kinds:
        own = kind.replace("-", "_")
        parts.append(_Part(kind, own, words + "".join(map(str.capitalize, kind.split("-")))))
    titles = [part.kind.replace("-", " ") for part in parts]
    *first, last = (f"{'an' if title[0] in 'aeiou' else 'a'} {title}" for title in titles)
    summary = f"{', '.join(first)} and {last}" if first else last
    if len(first) > 2:
        summary = "components of several kinds"
    hooks = [
        {"name": of.hook, "module": part.module, "component": part.component}
        for part in parts
        if (of := known_kinds()[part.kind]) is not None
    ]
    values = {
        "project": project, "package": package, "name": name, "kinds": kinds, "hooks": hooks,
        "summary": summary[:1].upper() + summary[1:],
    }  # fmt: skip
    uses = [
        {"title": title.capitalize(), "text": _render(f"{part.kind}/use.md", values).strip()}
        for title, part in zip(titles, parts, strict=True)
    ]
    texts = {
        target: _render(f"package/{source}", {**values, "uses": uses})
        for source, target in _COMMON.items()
    }
    texts[f"src/{package}/__init__.py"] = _render("package/__init__.py", values)
    texts[f"src/{package}/py.typed"] = ""
    for part in parts:
        own_values = {**values, "component": part.component}
        if part.kind == RECIPE:
            texts[f"src/{package}/recipes/__init__.py"] = f'"""Recipes of {project}."""\n'
            made = f"src/{package}/recipes/{name}.toml", "component.toml"
        else:
            made = f"src/{package}/{part.module}.py", "component.py"
        texts[made[0]] = _render(f"{part.kind}/{made[1]}", own_values)
        texts[f"tests/test_{part.module}.py"] = _render(f"{part.kind}/test.py", own_values)
    # whole or not at all: a package of which half is missing would fail its own tests
    with new_folder(folder) as fresh:
        for target, text in texts.items():
            path = fresh / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return [folder / target for target in texts]


def _spelt(kind: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind).lower()


def _known(kind: str) -> str:
    spelt = _spelt(kind).replace("_", "-")
    if spelt not in known_kinds():
        hint = did_you_mean(spelt, known_kinds(), f"there are: {', '.join(known_kinds())}")
        raise PluginError(f"there is no kind `{kind:.100}`; {hint}")
    return spelt


def _names(project: str) -> tuple[str, str]:
    """Return the names of the package for `import` and of its components."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", project) or len(project) > _LONGEST:
        raise PluginError(
            f"`{project:.100}` names no package; use lower-case letters and digits, with single "
            f"hyphens between them, {_LONGEST} at most: llava-{_proposed(project)}"
        )
    package, name = project.replace("-", "_"), project.removeprefix("llava-")
    if name[0].isdigit():
        raise PluginError(f"`{name}` begins with a digit; begin the component's name with a letter")
    # `find_spec` also finds what is installed:
    # a package of the same name would hide it, or be hidden
    if iskeyword(package) or package in sys.stdlib_module_names or find_spec(package) is not None:
        raise PluginError(
            f"`import {package}` means something else already; name the package llava-{name}"
        )
    return package, name


def _proposed(project: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", project.lower()).strip("-").removeprefix("llava-")
    return plain[: _LONGEST - 6].strip("-") or "mine"


def _refuse_taken(name: str, kinds: Sequence[str]) -> None:
    """Raise PluginError where an installed plugin has a component or command of this name."""
    registry = Registry.installed()
    for kind in kinds:
        component = known_kinds()[kind]
        if kind == RECIPE:
            taken = dict.fromkeys(name.partition("/")[0] for name in recipe_files())
            taken |= {p.name: p.dist.name if p.dist else "" for p in entry_points(group=RECIPES)}
        elif component is not None:
            taken = {n: package for n, (package, _) in registry.origins(component).items()}
        else:
            taken = {p.name: p.dist.name if p.dist else "" for p in entry_points(group=GROUP)}
        if name in taken:
            raise PluginError(
                f"{taken[name] or 'an installed package'} has a {kind.replace('-', ' ')} `{name}` "
                f"already; choose another name (taken: {and_more(list(taken), 8)})"
            )


def _render(template: str, values: Mapping[str, object]) -> str:
    text = _environment().get_template(f"{template}.jinja").render(values)
    return f"{text.rstrip()}\n"


@cache
def _environment() -> Environment:
    # other brackets than usual: GitHub's workflows and Python's formats have those of Jinja
    return Environment(
        loader=PackageLoader("llavakit_plugins.scaffolding"),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
