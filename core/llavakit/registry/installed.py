"""Installed plugins: which are used, and what is wrong with one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from inspect import isfunction

from llavakit.contracts import hooks
from llavakit.contracts.errors import PluginError, did_you_mean
from llavakit.registry.entry_points import package_of, told


def check_hooks(plugin: object, name: str) -> None:
    """Raise PluginError for hooks that are misspelt or lack their mark; warn of what looks so."""
    known = [hook for hook, _ in hooks.KINDS.values()]
    for found in dir(plugin):
        function = getattr(plugin, found, None)
        marked = hasattr(function, f"{hooks.PROJECT}_impl")
        if found in known and callable(function) and not marked:
            raise PluginError(
                f"plugin {name} has a function `{found}` that is no hook; write @hookimpl above it"
            )
        if found not in known and marked:
            hint = did_you_mean(found, known, f"there are: {', '.join(known)}")
            raise PluginError(f"plugin {name} has an unknown hook '{found}'; {hint}")
        if found.startswith("llava_") and found not in known and isfunction(function):
            hint = did_you_mean(found, known)
            warn_once(f"plugin {name} has a function `{found}`; {hint}") if hint else None


def wanted(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Return the built-in plugins, and of the others those that LLAVA_PLUGINS names, or all."""
    names = {part.strip() for part in os.environ.get("LLAVA_PLUGINS", "").split(",")} - {""}
    known = {point: {point.name, package_of(point)} for point in points}
    # built-in ones stay: a recipe without them has no steps
    others = [point for point in known if package_of(point) != hooks.PROJECT]
    there = {name for point in others for name in known[point]}
    for name in sorted(names - there):
        hint = did_you_mean(name, there, f"there are: {', '.join(sorted(there)) or 'none'}")
        raise PluginError(f"LLAVA_PLUGINS names `{name}`, but no plugin is called so; {hint}")
    every = "LLAVA_PLUGINS" not in os.environ
    return [p for p in known if p not in others or every or known[p] & names]


@contextmanager
def no_exit(whose: str) -> Iterator[None]:
    """Turn an exit, which would look as if all were done, into a PluginError."""
    try:
        yield
    except SystemExit as error:
        raise PluginError(f"{whose} cannot go on: {told(error)}; raise an error there") from error


_said: set[str] = set()


def warn_once(text: str, cause: BaseException | None = None) -> None:
    """Say something that stops nothing, once in a process; LLAVA_TRACEBACK shows its cause."""
    if text not in _said:
        _said.add(text)
        shown = cause if "LLAVA_TRACEBACK" in os.environ else None
        logging.getLogger("llavakit").warning("%s", text, exc_info=shown)
