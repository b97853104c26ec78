"""The options of a component that a command line states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from llavakit import Checker, Component, RecipeError, Registry, Source, boundless, set_key, stated

ComponentT = TypeVar("ComponentT", bound=Component)


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
    table = state_options(component, settings, registry, flags)
    return registry.make(component, component.Options.model_validate(table))


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
    sources = [stated(setting) for setting in settings]
    sources += [Source(said=f"--{name.replace('_', '-')}", key=(name,)) for name in flags or ()]
    for setting in settings:
        set_key(table, setting)
    read = partial(registry.read, component.Options, table, {})
    # nesting without an end first: the checks behind it would call themselves too often
    problems = list(boundless(table)) or list(
        Checker(registry, inputs=True).check_options(component, table, read, (), {})
    )
    if problems:
        sources.append(Source(said=component.name))
        raise RecipeError("\n\n".join(problem.render(sources, []) for problem in problems))
    return table
