"""Checks options, of a recipe or a command line, and says what is wrong with them and where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from llavakit.contracts.component import (
    INPUT_MARK,
    MODEL_MARK,
    Component,
    Options,
    SkippableUse,
    Use,
)
from llavakit.contracts.errors import RecipeError, did_you_mean
from llavakit.contracts.interfaces import Exporter
from llavakit.contracts.run import Step
from llavakit.recipe.overrides import Key, Source, Span
from llavakit.recipe.redaction import brief, redact
from llavakit.registry import LATER, Registry, StepFolders, kind_of
from llavakit.registry.entry_points import entry_points, imported

_DEEPEST = 50


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
        return brief(redact(self._render(sources, steps)))

    def _render(self, sources: Sequence[Source], steps: Sequence[str | None]) -> str:
        source, span = self._locate(sources, steps)
        if source.said:
            lines = [f"{brief(redact(source.said), 200)}: {self.message}"]
            return "\n".join([*lines, f" = help: {self.hint}"] if self.hint else lines)
        number = str(span.line)
        line = source.text.splitlines()[span.line - 1] if source.text else ""
        begin = max(0, span.start - 100)  # of a line without end, what is around the key
        line, span = line[begin:][:500], Span(span.line, span.start - begin, span.end - begin)
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
        spellings = [self.key]  # a recipe on a base addresses steps by number or name
        if len(self.key) > 1 and self.key[0] == "steps" and isinstance(self.key[1], int):
            index = self.key[1]
            for alias in (str(index + 1), steps[index] if index < len(steps) else None):
                if isinstance(alias, str):
                    spellings.append(("steps", alias, *self.key[2:]))
        found = [(source, *source.locate(*spellings)) for source in sources]
        source, span, _ = max(found, key=lambda location: location[2])
        return source, span


def sound(
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
                    yield from sound(annotation, value, (*key, name))
            elif isinstance(value, list) and get_origin(annotation) is tuple:
                adapter = TypeAdapter[object](get_args(annotation)[0])
                for index, item in enumerate(value):
                    with suppress(ValidationError):
                        yield (*key, name, index), adapter.validate_python(item)


def boundless(node: object, key: Key = ()) -> Iterator[Problem]:
    """Yield values that no option holds: of more than 64 bits, nested without end, no UTF-8."""
    if len(key) > _DEEPEST:
        yield Problem(key[:3], "it is nested too deeply", f"{_DEEPEST} tables in tables are enough")
    elif isinstance(node, int) and not -(2**63) <= node < 2**63:
        message = f"option `{key[-1]}`: an integer of TOML has 64 bits at most"
        yield Problem(key, message, "write a smaller one")
    elif isinstance(node, str) and re.search("[\ud800-\udfff]", node):  # a shell gives any bytes
        yield Problem(key, f"option `{key[-1]}` is no text in UTF-8", "write it again")
    elif isinstance(node, dict | list):
        for name, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from boundless(name, (*key, name))
            yield from boundless(item, (*key, name))


def parts(node: object) -> Iterator[tuple[str | int, Any]]:
    """Yield what a model, a table or a list holds, by name or index, but for choices to skip."""
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(node, BaseModel):
        items = ((name, getattr(node, name)) for name in type(node).model_fields)
    elif isinstance(node, Mapping):
        items = ((str(name), item) for name, item in node.items())
    elif isinstance(node, tuple | list):
        items = enumerate(node)
    yield from ((k, v) for k, v in items if not (isinstance(v, SkippableUse) and v.skip))


@dataclass(frozen=True)
class Checker:
    """Finds what is wrong with choices and their options."""

    registry: Registry
    inputs: bool  #: Whether files and weights that options name must be there.

    def check(self, node: object, key: Key, steps: StepFolders) -> Iterator[Problem]:
        """Yield the problems of a choice, or of all below a model, table or list, in file order.

        `steps` are the folders of the steps before it.
        """
        if isinstance(node, Use):
            try:
                component = self.registry.chosen(node)
            except RecipeError as error:
                yield Problem((*key, "use"), str(error))
                return
            read = partial(self.registry.options, node, steps)
            yield from self.check_options(component, node.options, read, key, steps)
            return
        fields = type(node).model_fields if isinstance(node, BaseModel) else {}
        earlier = dict(steps)
        for name, value in parts(node):
            marks = _marks(fields[name]) if self.inputs and name in fields else ()
            if INPUT_MARK in marks:
                yield from self._absent(value, (*key, name), MODEL_MARK in marks)
                continue
            yield from self.check(value, (*key, name), earlier)
            if isinstance(value, SkippableUse) and issubclass(kind_of(value), Step):
                earlier |= dict.fromkeys((value.use, f"{int(name) + 1:02}-{value.use}"), LATER)

    def check_options(
        self,
        component: type[Component],
        table: Mapping[str, Any],
        read: Callable[[], Options],
        key: Key,
        steps: StepFolders,
    ) -> Iterator[Problem]:
        """Yield the problems of a component's options: `read` validates what `table` states."""
        try:
            options = read()
        except ValidationError as error:
            yield from problems_in(error, component.Options, key, f" of `{component.name}`")
            for inner, value in sound(component.Options, table, key):
                yield from self.check(value, inner, steps)
            return
        if self.inputs and (sentence := component.missing(options)):
            yield Problem((*key, "use"), sentence)
        yield from self.check(options, key, steps)

    def _absent(self, value: object, key: Key, a_model: bool) -> Iterator[Problem]:
        for path in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(path, Path) or str(path).startswith("@") or path.exists():
                continue
            layouts = self.registry.all(Exporter).values() if a_model else ()
            # a model may have a name in a public collection instead
            if not any(layout.names(path.as_posix()) for layout in layouts):
                yield Problem(key, f"`{key[-1]}`: {path} does not exist", _path_hint(path))


def _marks(field: FieldInfo) -> list[object]:
    """Return the marks of an option's type, an optional one's, too: INPUT_MARK, MODEL_MARK."""
    optional = (getattr(part, "__metadata__", ()) for part in get_args(field.annotation))
    return [*field.metadata, *(mark for metadata in optional for mark in metadata)]


def _path_hint(path: Path) -> str:
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = "relative paths start at the working directory; `@step/file` is an earlier step's file"
    return did_you_mean(path.name, beside, hint, path.with_name)


def problems_in(
    error: ValidationError, model: type[BaseModel], key: Key = (), owner: str = ""
) -> Iterator[Problem]:
    """Yield what pydantic complains of, in the words of recipes."""
    for item in error.errors(include_url=False):
        loc = tuple(part for part in item["loc"] if part != "[key]")  # of a table's own name
        where, last = (*key, *loc), loc[-1] if loc else ""
        entry = isinstance(last, int) and len(loc) > 1
        option = f"`{loc[-2]}`, entry {last + 1}," if entry else f"`{last}`"  # type: ignore[operator]
        known = list(_fields(model, item["loc"][:-1]))
        if item["type"] == "model_type" and not isinstance(item["input"], dict | Use):
            hint = f'write {{ use = "NAME" }}; got {_show(item["input"])}'
            yield Problem(where, f"option {option}{owner} is a table", hint)
        elif item["type"] == "extra_forbidden":
            hint = did_you_mean(str(last), known, f"known: {', '.join(known)}" if known else "")
            for names in entry_points(group="llavakit.displays", name="names"):  # of other programs
                hint = imported(names)(str(last)) or hint
            yield Problem(where, f"unknown option `{last}`{owner}", hint)
        elif item["type"] == "tuple_type" and isinstance(item["input"], dict):
            hint = f"write [[{last}]] for a table of it" if len(loc) == 1 else "write it as [...]"
            yield Problem(where, f"option `{last}`{owner} is a list", hint)
        elif item["type"] == "missing" and entry:
            yield Problem(where[:-1], f"option `{loc[-2]}`{owner} is too short a list", "")
        elif item["type"] == "missing":
            yield Problem(where[:-1], f"missing option `{last}`{owner}", "add it")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            subject = f"option {option}{owner}" if loc else f"options{owner}"
            hint = f"got {_show(item['input'])}" if loc else ""
            yield Problem(where, f"{subject}: {message}", hint)


def _fields(model: type[BaseModel], path: Sequence[str | int]) -> Iterator[str]:
    """Yield the option names of the model that `path` leads to, where that is a single one."""
    for part in path:
        kind = field.annotation if (field := model.model_fields.get(str(part))) else None
        models = [one for one in (kind, *get_args(kind)) if isinstance(one, type(BaseModel))]
        if len(models) != 1:
            return
        model = models[0]
    yield from model.model_fields


def _show(value: Any) -> str:
    text = repr(value)
    short = text if len(text) <= 120 else f"{text[:117]}..."
    return f"`{short}` ({type(value).__name__})"
