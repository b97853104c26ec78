"""The options of a component as a table, read from its pydantic model and that model's source."""

from __future__ import annotations

import ast
import enum
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any, ForwardRef, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llavakit import Use, kind_of

_PLAIN = {
    str: "text", int: "integer", float: "number", bool: "`true` or `false`", Path: "path",
    type(None): "none", Any: "anything",
}  # fmt: skip
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Option:
    """What a recipe can say of a component, in words."""

    name: str
    takes: str  #: What values, with their bounds.
    default: str  #: As TOML would have it; empty where it must be given.
    text: str  #: The docstring below the field.


def options_of(model: type[BaseModel]) -> list[Option]:
    """Return the options in the order of the model."""
    texts = _texts(model)
    return [
        Option(name, _takes(field), _default(field), texts.get(name, field.description or ""))
        for name, field in model.model_fields.items()
    ]


def _texts(model: type[BaseModel]) -> dict[str, str]:
    """Return the string below each field in the source of the model and those it derives from."""
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not (issubclass(base, BaseModel) and base.__module__.partition(".")[0] != "pydantic"):
            continue
        try:
            # Python keeps no docstring of a field: it is only in the source
            tree = ast.parse(dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made without a file
            continue
        body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef)), [])
        for field, below in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                texts[field.target.id] = " ".join(below.value.value.split())
    return texts


def _takes(field: FieldInfo) -> str:
    words = _named(field.annotation)
    bounds = [
        f"{said} {bound:g}"
        for mark in field.metadata
        for key, said in _BOUNDS.items()
        if isinstance(bound := getattr(mark, key, None), int | float)
    ]
    return ", ".join([words, *bounds])


def _named(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if origin is Literal:
        return ", ".join(f"`{_toml(value)}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_named(arg) for arg in args if arg is not type(None))
    if hasattr(annotation, "__metadata__"):
        return _named(args[0])
    if isinstance(annotation, type) and issubclass(annotation, Use):
        return f"a choice of {kind_of(annotation).__name__}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"table of {_named(args[1])}" if args else "table"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        inner = list(dict.fromkeys(_named(arg) for arg in args if arg is not Ellipsis))
        return f"list of {' and '.join(inner)}" if inner else "list"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"table of {', '.join(f'`{name}`' for name in annotation.model_fields)}"
    if isinstance(annotation, ForwardRef | str):
        return str(getattr(annotation, "__forward_arg__", annotation))
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        made = field.default_factory()  # type: ignore[call-arg]
        return _toml(made) if made else "none"
    if field.default is PydanticUndefined:
        return ""
    return "none" if field.default is None else _toml(field.default) or '""'


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, BaseModel):
        inner = value.model_dump(mode="json", exclude_none=True)
        return _toml(inner) if inner else "none"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_quoted(item)}' for key, item in value.items())} }}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_quoted, value))}]" if value else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else _toml(value)


def markdown_table(options: Sequence[Option]) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield "| option | takes | default | what it says |"
    yield "|---|---|---|---|"
    for option in options:
        default = f"`{option.default}`" if option.default not in ("", "none") else option.default
        cells = (f"`{option.name}`", option.takes, default, option.text)
        escaped = [cell.replace("|", "&#124;") for cell in cells]
        yield f"| {' | '.join(escaped)} |"
