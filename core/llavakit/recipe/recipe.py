"""The recipe: what to build and what to do with it, read from a TOML file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import EnvSettingsSource, SettingsError

from llavakit.contracts.component import SkippableUse, Use
from llavakit.contracts.errors import RecipeError, did_you_mean
from llavakit.contracts.interfaces import Tracker
from llavakit.contracts.run import Step
from llavakit.recipe.check import Checker, Problem, boundless, problems_in, sound
from llavakit.recipe.model_choice import ModelRecipe, StatedTable
from llavakit.recipe.overrides import Key, Source, set_key, stated, step_index
from llavakit.registry import LATER, Registry
from llavakit.registry.entry_points import entry_points, imported


class StepUse(SkippableUse[Step]):
    """A step of a recipe."""


class Machine(StatedTable):
    """What the plan reckons with. Left out: the machine that plans."""

    name: str = "this machine"
    devices: int = Field(default=1, ge=1)
    tflops: float | None = Field(default=None, gt=1e-6)  #: Sustained rate of a device, 10^12/s.
    memory_gb: float | None = Field(default=None, gt=0)
    usd_per_hour: float = Field(default=0.0, ge=0)  #: Price of all devices together.


class Published(StatedTable):
    """A figure of the paper that a recipe is the miniature of; `llava-run compare` shows it."""

    table: str  #: Where the paper has it; only figures of one table are compared.
    metric: str  #: Which metric of ours stands beside it, as `step.metric`.
    value: float


class Recipe(StatedTable):
    """One run, from start to end. The environment, `LLAVA_SEED=1`, overrides the file."""

    name: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"  #: `auto` is CUDA where there is one, else MPS, else the CPU.
    # not an optional type: pydantic would tell of a wrong part that all of it is wrong
    model: ModelRecipe = cast("ModelRecipe", None)
    """None where it is left out, as it may be where no step needs one; `parts` refuses that."""
    steps: tuple[StepUse, ...] = Field(min_length=1)
    trackers: tuple[Use[Tracker], ...] = (Use[Tracker](use="report"),)
    machine: Machine = Machine()
    paper: tuple[Published, ...] = ()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
            raise ValueError(
                "it names the run's folder, so it begins with a letter or digit of ASCII and holds "
                "only these, `.`, `_` and `-`, 200 at most"
            )
        return name

    @field_validator("trackers", mode="before")
    @classmethod
    def _reads_names(cls, trackers: Any) -> Any:
        if not isinstance(trackers, list | tuple):
            return trackers
        return [{"use": tracker} if isinstance(tracker, str) else tracker for tracker in trackers]

    @field_validator("device")
    @classmethod
    def _is_known(cls, device: str) -> str:
        if device.partition(":")[0] == "meta":  # torch knows it, but nothing on it has a value
            raise ValueError(f"device `{device}` is not available on this machine; use cpu or auto")
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu|hpu|xla|npu)(:\d+)?", device):
            raise ValueError(f"device `{device}` is none of torch's; use auto, cpu, cuda or mps")
        return device

    @classmethod
    def load(
        cls, path: Path, registry: Registry, overrides: Sequence[str] = (), *, inputs: bool = False
    ) -> Recipe:
        """Read a recipe and check every component and option that it names.

        `overrides` are `a.b.c=value`, each value a TOML literal or else a string. With `inputs`
        the files and the weights that it needs must be there, too.
        Raises RecipeError with every problem at once, each at its line.
        """
        # the weakest first: the environment wins over files, --set over both
        files, table = read_tables(path)
        table = _merge(table, _from_environment(), ())
        for override in overrides:
            set_key(table, override)
        if own := re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._"):
            table.setdefault("name", own[:200])
        uses = [step.get("use") for step in _steps(table)]
        names = [use if isinstance(use, str) else None for use in uses]
        sources = [*(stated(override) for override in overrides[::-1]), *_environment(), *files]
        checker = Checker(registry, inputs)
        if problems := list(boundless(table)):
            raise RecipeError("\n\n".join(problem.render(sources, names) for problem in problems))
        try:
            recipe = cls(**table)
        except ValidationError as error:
            later = dict.fromkeys(filter(None, names), LATER)
            problems = list(problems_in(error, cls))
            for key, value in sound(cls, table):
                problems += checker.check(value, key, later)
            if "model" not in table and not names:
                problems += missing_model((), registry)
        else:
            problems = list(checker.check(recipe, (), {}))
            if recipe.model is None and inputs:
                problems += missing_model(recipe.steps, registry)
            if not problems:
                return recipe
        raise RecipeError("\n\n".join(problem.render(sources, names) for problem in problems))

    def parts(self) -> ModelRecipe:
        """Return the model's parts. Raises RecipeError where the recipe names none."""
        if self.model is None:
            raise RecipeError(
                f"recipe `{self.name}` has no [model], but one of its steps needs one; add it"
            )
        return self.model

    def active_steps(self) -> Iterator[tuple[str, StepUse]]:
        """Yield the folder name and the choice of every step that is not skipped."""
        for number, use in enumerate(self.steps, start=1):
            if not use.skip:
                yield f"{number:02}-{use.use}", use


def _environment() -> Iterator[Source]:
    """Yield what the environment sets, as pydantic-settings reads it."""
    for name, value in os.environ.items():
        if name.upper().startswith("LLAVA_"):
            key = tuple(name[len("LLAVA_") :].lower().split("__"))
            if len(key) > 1 and key[0] not in (known := Recipe.model_fields):
                hint = did_you_mean(key[0], known, f"a recipe has {', '.join(known)}")
                raise RecipeError(f"environment variable {name}: no `{key[0]}` in a recipe; {hint}")
            yield Source(said=f"environment variable {name}={value}", key=key)


def _from_environment() -> dict[str, Any]:
    """Return the table that the environment states. Raises RecipeError where it is none."""
    recipe = cast("Any", Recipe)  # no BaseSettings, which would read the environment by itself
    try:
        return EnvSettingsSource(recipe, env_prefix="LLAVA_", env_nested_delimiter="__")()
    except SettingsError as error:
        raise RecipeError(
            f"the environment sets a table by LLAVA_…, but not as JSON: {error} "
            f"({error.__cause__}); fix or unset that variable"
        ) from error


def recipe_folder() -> Path:
    """Return the folder of the built-in recipes, in a wheel or in a checkout."""
    package = Path(__file__).parents[1]
    packaged = package / "recipes"
    # the wheel carries them within the package
    return packaged if packaged.is_dir() else package.parents[1] / "recipes"


def recipe_files() -> dict[str, Path]:
    """Return every installed recipe: ours by name, a plugin's as `PLUGIN/NAME`."""
    folders = {"": recipe_folder()}
    for point in entry_points(group="llavakit.recipes"):  # each names a package of TOML files
        folders[f"{point.name}/"] = Path(imported(point).__path__[0])
    return {
        prefix + file.relative_to(folder).with_suffix("").as_posix(): file
        for prefix, folder in folders.items()
        for file in sorted(folder.rglob("*.toml"))
    }


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Return the file `name`, or the installed recipe of that name."""
    path = Path(name)
    if path.suffix == ".toml":
        # `base` is looked for beside the recipe that names it
        return path if beside is None else beside / path
    for folder in (beside, recipe_folder()):
        if folder is not None and os.path.isfile(file := folder / f"{name}.toml"):
            return file
    if name in (known := recipe_files()):
        return known[name]
    hint = did_you_mean(name, known, f"there are: {', '.join(known)}")
    raise RecipeError(f"no built-in recipe is called `{name}`; {hint}")


def read_tables(path: Path) -> tuple[list[Source], dict[str, Any]]:
    """Return the recipe's own file and those it builds on, and the merged table."""
    sources: list[Source] = []
    tables: list[dict[str, Any]] = []
    current: Path | None = path
    while current is not None:
        if any(current.resolve() == source.path.resolve() for source in sources):
            raise RecipeError(f"{current} builds on itself; remove `base` from one of the recipes")
        try:
            text = current.read_text(encoding="utf-8-sig")
            table = tomllib.loads(text)
        except OSError as error:
            raise RecipeError(f"cannot read recipe {current}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"{current} is not UTF-8 text: {error.reason}") from error
        except (ValueError, RecursionError) as error:  # numbers and lists without end, too
            raise RecipeError(f"{current} is not valid TOML: {error}") from error
        if tables:
            table.pop("name", None)  # of another run, in a folder of its own
        sources.append(Source(current, text))
        tables.append(table)
        base = table.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise RecipeError(f'{current}: `base` names one recipe, for example base = "tiny"')
        if base is not None and isinstance(table.get("steps"), list):
            hint = "change one in [steps.NAME]; for other steps leave out `base`, and copy [model]"
            problem = Problem(("steps",), "[[steps]] would replace all steps of `base`", hint)
            raise RecipeError(problem.render(sources[-1:], []))
        current = None if base is None else find_recipe(base, current.parent)
    merged = tables.pop()
    while tables:
        merged = _merge(merged, tables.pop(), ())
    return sources, merged


def _merge(base: Any, change: Any, key: Key) -> Any:
    """Return `base` with the values of `change`; steps are addressed by name or number."""
    if isinstance(base, dict) and isinstance(change, dict):
        if "use" in change and change["use"] != base.get("use"):
            return change  # another component: the old one's options do not carry over
        merged = dict(base)
        for name, value in change.items():
            merged[name] = _merge(base[name], value, (*key, name)) if name in base else value
        return merged
    if isinstance(base, list) and isinstance(change, dict):
        merged_list = list(base)
        for name, value in change.items():
            index = step_index(merged_list, name, key)
            merged_list[index] = _merge(merged_list[index], value, (*key, index))
        return merged_list
    return change


def _steps(table: dict[str, Any]) -> list[dict[str, Any]]:
    steps = table.get("steps")
    return [s if isinstance(s, dict) else {} for s in steps] if isinstance(steps, list) else []


def missing_model(steps: Sequence[StepUse], registry: Registry) -> Iterator[Problem]:
    """Yield that there is no model, unless no step needs one.

    A step needs none where `init` names another, or where a step before it leaves one.
    """
    needing, left = None, False
    for use in steps:
        if use.skip:
            continue
        with suppress(RecipeError, ValidationError):  # which is said elsewhere
            step = registry.chosen(use)
            if not (left or needing) and step.needs_model and use.options.get("init") is None:
                needing = use.use  # the first one: what stands behind it may have its model
            before, left = left, True  # unless its options can be read, and say otherwise
            left = before or "model" in (step.leaves(registry.options(use)) or {})
    if needing or not steps:
        hint = f"`{needing}` needs one: add [model], or state `init`" if needing else "add it"
        yield Problem((), "missing option `model`", hint)
