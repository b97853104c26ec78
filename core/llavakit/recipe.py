"""The recipe: what to build and what to do with it, read from a TOML file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from llavakit.assembly import ModelRecipe
from llavakit.comparing.published import Published
from llavakit.components import LATER, Component, SkippableUse, Use, is_input
from llavakit.errors import RecipeError
from llavakit.interfaces import Step, Tracker
from llavakit.registry import ComponentT, Registry
from llavakit.toml_lines import Key, Place, Span, locate


class StepUse(SkippableUse[Step]):
    """A step of a recipe."""


class Machine(BaseModel):
    """What the plan reckons with. Left out: the machine that plans."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "this machine"
    devices: int = Field(default=1, ge=1)
    tflops: float | None = Field(default=None, gt=0)
    """Sustained rate of one device in 10^12 floating-point operations a second."""
    memory_gb: float | None = Field(default=None, gt=0)
    usd_per_hour: float = Field(default=0.0, ge=0)
    """Price of all devices together."""


class Recipe(BaseSettings):
    """One run, from start to end. `LLAVA_SEED=1` in the environment overrides the file."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="LLAVA_", env_nested_delimiter="__"
    )

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    """`auto` is CUDA where there is one, else the CPU."""
    # not an optional type: pydantic would tell of a wrong part that all of it is wrong
    model: ModelRecipe = Field(default=cast("ModelRecipe", None), validate_default=False)
    """None where it is left out, as it may be where no step needs one; `parts` refuses that."""
    steps: tuple[StepUse, ...] = Field(min_length=1)
    trackers: tuple[Use[Tracker], ...] = ()
    machine: Machine = Machine()
    paper: tuple[Published, ...] = ()

    @classmethod
    def load(
        cls,
        path: Path,
        registry: Registry,
        overrides: Sequence[str] = (),
        *,
        inputs: bool = False,
    ) -> Recipe:
        """Read a recipe and check every component and option that it names.

        `overrides` are `a.b.c=value`, each value a TOML literal or else a string. With `inputs`
        the files and the weights that it needs must be there, too.
        Raises RecipeError with every problem at once, each at its line.
        """
        files, table = read_tables(path)
        for override in overrides:
            _override(table, override)
        table.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._"))
        names = [step.get("use") for step in _steps(table)]
        sources = [*_environment(), *(_said(override) for override in overrides[::-1]), *files]
        try:
            recipe = cls(**table)
        except SettingsError as error:
            raise RecipeError(
                f"the environment sets a table by LLAVA_…, but not as JSON: {error} "
                f"({error.__cause__}); mend or unset that variable"
            ) from error
        except ValidationError as error:
            later = dict.fromkeys(filter(None, names), LATER)
            problems = list(_problems(error, cls))
            for key, value in _sound(cls, table):
                problems += _check_value(value, registry, key, later, inputs)
            if "model" not in table and not names:
                problems += _missing_model((), registry)
        else:
            problems = list(_check(recipe, registry, (), {}, inputs))
            if recipe.model is None and inputs:
                problems += _missing_model(recipe.steps, registry)
            if not problems:
                return recipe
        raise RecipeError("\n\n".join(problem.render(sources, names) for problem in problems))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the environment wins over the file

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


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A recipe file that took part, as text; or a key that was set elsewhere."""

    path: Path
    text: str
    said: str = ""
    """Where a single key was set, if not in a file, for example `--set seed=1`."""
    key: Key = ()
    """Which key that was, as it was written."""

    def locate(self, *spellings: Key) -> Place:
        """Return the place of a key in the file, or how much of it was set here."""
        if not self.said:
            return locate(self.text, *spellings)
        nowhere = Span(1, 0, 0)
        if any(self.key == key[: len(self.key)] for key in spellings):
            return Place(nowhere, len(self.key))
        around = [len(key) for key in spellings if key == self.key[: len(key)]]
        return Place(nowhere, max(around, default=0) - 0.5)  # a file that says it comes first


def _said(override: str) -> Source:
    path = override.partition("=")[0].strip().split(".")
    return Source(Path(), "", f"--set {override}", tuple(path))


def _environment() -> Iterator[Source]:
    """Yield what the environment sets, as pydantic-settings reads it."""
    for name, value in os.environ.items():
        if name.upper().startswith("LLAVA_"):
            key = tuple(name[len("LLAVA_") :].lower().split("__"))
            yield Source(Path(), "", f"environment variable {name}={value}", key)


def recipe_folder() -> Path:
    """Return the folder of the built-in recipes, in a wheel or in a checkout."""
    package = Path(__file__).parent
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parents[1] / "recipes"


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Return the file `name`, or the built-in recipe of that name."""
    path = Path(name)
    if path.suffix == ".toml":
        return path if beside is None else beside / path
    for folder in (beside, recipe_folder()):
        if folder is not None and (file := folder / f"{name}.toml").is_file():
            return file
    folder = recipe_folder()
    known = sorted(
        file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.toml")
    )
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(known)}"
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
            text = current.read_text(encoding="utf-8")
            table = tomllib.loads(text)
        except OSError as error:
            raise RecipeError(f"cannot read recipe {current}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"{current} is not UTF-8 text: {error.reason}") from error
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{current} is not valid TOML: {error}") from error
        sources.append(Source(current, text))
        tables.append(table)
        base = table.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise RecipeError(f'{current}: `base` names one recipe, for example base = "tiny"')
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
            index = _step_index(merged_list, name, key)
            merged_list[index] = _merge(merged_list[index], value, (*key, index))
        return merged_list
    return change


def _step_index(items: list[Any], name: str, key: Key) -> int:
    names = [item.get("use") if isinstance(item, dict) else None for item in items]
    if name.isdecimal() and 1 <= int(name) <= len(items):
        return int(name) - 1
    if names.count(name) == 1:
        return names.index(name)
    known = ", ".join(f"{number} ({use})" for number, use in enumerate(names, start=1))
    what = "more than one entry is" if name in names else "no entry is"
    raise RecipeError(
        f"`{'.'.join(map(str, key))}.{name}`: {what} called `{name}`; there are: {known}"
    )


def _steps(table: dict[str, Any]) -> list[dict[str, Any]]:
    steps = table.get("steps")
    return [s if isinstance(s, dict) else {} for s in steps] if isinstance(steps, list) else []


def _override(table: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    path = name.strip().split(".")
    if not separator or not all(path):
        raise RecipeError(f"--set {override}: write it as a.b.c=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    node: Any = table
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            index = _step_index(node, part, tuple(path[:depth]))
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last and part == "use" and node.get("use", value) != value:
                node.clear()  # another component: the old one's options do not carry over
            if last:
                node[part] = value
            node = node.setdefault(part, {})
        else:
            raise RecipeError(f"--set {override}: `{'.'.join(path[:depth])}` has no parts")


_SECRET = re.compile(
    r"(?<![\w-])(?:sk|pk|key)-[\w-]{12,}|(?<=key = \")[^\"]+(?=\")|(?<=key=)\S+", re.IGNORECASE
)


# -- checking --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe."""

    key: Key
    message: str
    hint: str = ""

    def render(self, sources: Sequence[Source], steps: Sequence[str | None]) -> str:
        """Return the message with the line it is about, as compilers do; keys of services hidden.

        `steps` are the steps' names, by which a recipe with a `base` may address them.
        """
        return _SECRET.sub("[hidden]", self._render(sources, steps))

    def _render(self, sources: Sequence[Source], steps: Sequence[str | None]) -> str:
        source, span = self._locate(sources, steps)
        if source.said:
            lines = [f"{source.said}: {self.message}"]
            return "\n".join([*lines, f" = help: {self.hint}"] if self.hint else lines)
        number = str(span.line)
        line = source.text.splitlines()[span.line - 1] if source.text else ""
        gutter = " " * len(number)
        lines = [
            f"{source.path}:{span.line}: {self.message}",
            f" {gutter} |",
            f" {number} | {line}",
            f" {gutter} | {' ' * span.start}{'^' * max(1, span.end - span.start)}",
        ]
        return "\n".join([*lines, f" {gutter} = help: {self.hint}"] if self.hint else lines)

    def _locate(
        self, sources: Sequence[Source], steps: Sequence[str | None]
    ) -> tuple[Source, Span]:
        """Return the source that says most of the key, the strongest one first."""
        spellings = [self.key]
        if len(self.key) > 1 and self.key[0] == "steps" and isinstance(self.key[1], int):
            index = self.key[1]
            for alias in (str(index + 1), steps[index] if index < len(steps) else None):
                if isinstance(alias, str):
                    spellings.append(("steps", alias, *self.key[2:]))
        places = [(source, *source.locate(*spellings)) for source in sources]
        source, span, _ = max(places, key=lambda place: place[2])
        return source, span


def _sound(
    model: type[BaseModel], table: Mapping[str, Any], key: Key = ()
) -> Iterator[tuple[Key, object]]:
    """Yield what is valid by itself in a table that is not, so that its parts can be checked."""
    for name, field in model.model_fields.items():
        if name not in table:
            continue
        value, annotation = table[name], cast("Any", field.annotation)
        try:
            yield (*key, name), TypeAdapter[object](annotation).validate_python(value)
        except ValidationError:
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                if isinstance(value, Mapping):
                    yield from _sound(annotation, value, (*key, name))
            elif isinstance(value, list):
                adapter = TypeAdapter[object](get_args(annotation)[0])
                for index, item in enumerate(value):
                    with suppress(ValidationError):
                        yield (*key, name, index), adapter.validate_python(item)


def _missing_model(steps: Sequence[StepUse], registry: Registry) -> Iterator[Problem]:
    """Yield that there is no model, unless no step needs one: `init` names another."""
    known = registry.all(Step)
    needing = [
        step.use
        for step in steps
        if not step.skip
        and step.use in known
        and known[step.use].needs_model
        and step.options.get("init") is None
    ]
    if needing or not steps:
        hint = f"`{needing[0]}` needs one: add [model], or state `init`" if needing else "add it"
        yield Problem((), "missing option `model`", hint)


def _check(
    node: BaseModel, registry: Registry, key: Key, steps: Mapping[str, Path], inputs: bool
) -> Iterator[Problem]:
    """Yield the problems of every `Use` below `node`, in file order."""
    for name, field in type(node).model_fields.items():
        value = getattr(node, name)
        if inputs and is_input(field):
            for path in value if isinstance(value, tuple | list) else (value,):
                if _is_absent(path):
                    message = f"`{name}`: {path} does not exist"
                    yield Problem((*key, name), message, _path_hint(path))
        else:
            yield from _check_value(value, registry, (*key, name), steps, inputs)


def _check_value(
    value: object, registry: Registry, key: Key, steps: Mapping[str, Path], inputs: bool
) -> Iterator[Problem]:
    """Yield the problems of every `Use` in a value: a choice, or a table or list with some."""
    if isinstance(value, Use):
        yield from _check_use(value, registry, key, steps, inputs)
    elif isinstance(value, BaseModel):
        yield from _check(value, registry, key, steps, inputs)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _check_value(item, registry, (*key, str(name)), steps, inputs)
    elif isinstance(value, tuple | list):
        earlier = dict(steps)
        for index, item in enumerate(value):
            if isinstance(item, SkippableUse) and item.skip:
                continue
            yield from _check_value(item, registry, (*key, index), earlier, inputs)
            if isinstance(item, StepUse):
                earlier |= dict.fromkeys((item.use, f"{index + 1:02}-{item.use}"), LATER)


def _check_use(
    use: Use[Any], registry: Registry, key: Key, steps: Mapping[str, Path], inputs: bool
) -> Iterator[Problem]:
    try:
        component: type[Component] = registry.get(use.kind(), use.use)
    except RecipeError as error:
        yield Problem((*key, "use"), str(error))
        return
    yield from _check_options(component, use.options, registry, key, steps, inputs)


def _check_options(
    component: type[Component],
    table: Mapping[str, Any],
    registry: Registry,
    key: Key,
    steps: Mapping[str, Path],
    inputs: bool,
) -> Iterator[Problem]:
    try:
        options = component.Options.model_validate(table, context={"steps": steps})
    except ValidationError as error:
        yield from _problems(error, component.Options, key, f" of `{component.name}`")
        for inner, value in _sound(component.Options, table, key):
            yield from _check_value(value, registry, inner, steps, inputs)
        return
    if inputs and (sentence := component.missing(options)):
        yield Problem((*key, "use"), sentence)
    yield from _check(options, registry, key, steps, inputs)


def _is_absent(value: object) -> bool:
    return isinstance(value, Path) and not str(value).startswith("@") and not value.exists()


def _path_hint(path: Path) -> str:
    close = []
    if path.parent.is_dir():
        close = get_close_matches(path.name, [item.name for item in path.parent.iterdir()], n=1)
    if close:
        return f"did you mean `{path.parent / close[0]}`?"
    return "relative paths start at the working directory; `@step/file` is an earlier step's file"


def build_from(
    component: type[ComponentT],
    settings: Sequence[str],
    registry: Registry,
    flags: Mapping[str, Any] | None = None,
) -> ComponentT:
    """Return the component with the options that a command line states.

    `flags` are options by name, `settings` are `key=value` and win over them.
    Raises RecipeError with every problem at once.
    """
    return registry.make(component, state_options(component, settings, registry, flags))


def state_options(
    component: type[Component],
    settings: Sequence[str],
    registry: Registry,
    flags: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the options that a command line states, checked, as a recipe would state them.

    Raises RecipeError with every problem at once.
    """
    table: dict[str, Any] = dict(flags or {})
    sources = [_said(setting) for setting in settings]
    sources += [Source(Path(), "", f"--{name.replace('_', '-')}", (name,)) for name in flags or ()]
    for setting in settings:
        _override(table, setting)
    problems = list(_check_options(component, table, registry, (), {}, inputs=True))
    if problems:
        sources.append(Source(Path(), "", component.name))
        raise RecipeError("\n\n".join(problem.render(sources, []) for problem in problems))
    return table


def _problems(
    error: ValidationError, model: type[BaseModel], key: Key = (), owner: str = ""
) -> Iterator[Problem]:
    for item in error.errors(include_url=False):
        loc = tuple(part for part in item["loc"] if part != "[key]")  # of a table's own name
        where, last = (*key, *loc), loc[-1] if loc else ""
        known = list(_fields(model, item["loc"][:-1]))
        if item["type"] == "model_type" and not isinstance(item["input"], dict | Use):
            hint = f'write {{ use = "NAME" }}; got {_show(item["input"])}'
            yield Problem(where, f"option `{last}`{owner} is a table", hint)
        elif item["type"] == "extra_forbidden":
            close = get_close_matches(str(last), known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
            yield Problem(where, f"unknown option `{last}`{owner}", hint)
        elif item["type"] == "missing":
            yield Problem(where[:-1], f"missing option `{last}`{owner}", "add it")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            subject = f"option `{last}`{owner}" if loc else f"options{owner}"
            hint = f"got {_show(item['input'])}" if loc else ""
            yield Problem(where, f"{subject}: {message}", hint)


def _fields(model: type[BaseModel], path: Sequence[str | int]) -> Iterator[str]:
    """Yield the option names of the model that `path` leads to, where that is a plain one."""
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return
        model = annotation
    yield from model.model_fields


def _show(value: Any) -> str:
    text = repr(value)
    short = text if len(text) <= 120 else f"{text[:117]}..."
    return f"`{short}` ({type(value).__name__})"
