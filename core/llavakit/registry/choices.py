"""What a recipe's choices mean: their kind, and `@step/file`, a path in an earlier step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

from llavakit.contracts import hooks
from llavakit.contracts.component import Component, Use
from llavakit.contracts.errors import did_you_mean
from llavakit.registry.entry_points import explained, package_of

StepFolders = Mapping[str, Path]  #: Folders of earlier steps, by their names in a recipe.

LATER = Path("@")  #: Stands for the folder of a step that has not run, while a recipe is checked.


def step_path(value: str, folders: StepFolders | None) -> str | Path:
    """Return the path that an option means; where no recipe is around it, it stays what it is.

    Raises ValueError for one that cannot be, or that leaves the folder of its step.
    """
    # asking the system for such a name raises, where others are just not there
    if "\0" in value or len(value) > 4000 or max(map(len, value.encode().split(b"/"))) > 255:
        raise ValueError("no file can have this name")
    if not value.startswith("@") or folders is None:
        return value
    name, _, rest = value[1:].partition("/")
    if name not in folders:
        there = f"earlier: {', '.join(folders)}" if folders else "no step comes before this one"
        hint = did_you_mean(name, folders, there, "@{}".format)
        raise ValueError(f"no earlier step is called `{name}`; {hint}")
    # a recipe from elsewhere must not read the files beside a run
    if ".." in Path(rest).parts or Path(rest).is_absolute():
        raise ValueError(f"`{value}` leaves the folder of its step")
    return value if folders[name] is LATER else folders[name] / rest


def all_kinds() -> tuple[type[Component], ...]:
    """Return every kind, those of plugin packages, too. Imports torch."""
    return tuple(map(kind_of, hooks.KINDS))


def kind_of(use: Use[Any] | type[Use[Any]] | str) -> type[Component]:
    """Return the kind of a `Use[Kind]`, or of its name alone, which is imported only now."""
    if isinstance(use, str):
        own = hooks.OWN.get(use)
        package = package_of(own) if own else hooks.PROJECT
        with explained(f"plugin {package} cannot load its kind {use}"):
            return cast("type[Component]", own.load() if own else resolve_name(f"llavakit:{use}"))
    for base in (use if isinstance(use, type) else type(use)).__mro__:
        metadata = getattr(base, "__pydantic_generic_metadata__", None)
        if metadata and metadata["args"]:
            kind: type[Component] | str = metadata["args"][0]
            return kind_of(kind) if isinstance(kind, str) else kind
    raise TypeError(f"{use!r} names no kind; write Use[Kind]")


def texts_in(value: object) -> Iterator[str]:
    """Yield every text in options."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(item)
