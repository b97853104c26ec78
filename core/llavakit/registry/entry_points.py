"""What entry points of installed packages name. Needs neither pluggy nor pydantic: see --help."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points as read
from operator import attrgetter
from traceback import extract_tb
from typing import Any, cast

from llavakit.contracts.errors import PluginError

INSTALL = "the installation of llavakit is older than its files: install it again by pip"
_read = lru_cache(1)(lambda _changed: read())  # which takes 20 ms where 200 packages are


def entry_points(**chosen: str) -> EntryPoints:
    """Return those of a `group`, and of a `name`; packages are read again once one has changed."""
    changed = tuple(os.stat(path).st_mtime_ns for path in sys.path if os.path.isdir(path))
    return cast("EntryPoints", _read(changed).select(**chosen))


def only(group: str, name: str) -> Any:
    """Return what the one entry point of this group and name is. Raises PluginError."""
    found = list(entry_points(group=group, name=name))
    if not found:
        raise PluginError(f"no entry point of `{group}` is called `{name}`; {INSTALL}")
    if len(found) > 1:
        packages = " and ".join(sorted(map(package_of, found)))
        raise PluginError(f"{packages} both have `{name}` of `{group}`; uninstall one of them")
    return imported(found[0])


def imported(point: EntryPoint) -> Any:
    """Return what an entry point names. Raises PluginError where it cannot be imported."""
    with explained(f"plugin `{point.name}` of {package_of(point)} failed to import"):
        return point.load()


@contextmanager
def explained(failed: str) -> Iterator[None]:
    """Say of an error whose it is, whatever it is."""
    try:
        yield
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{failed}: {told(error)}; fix it or install it again (LLAVA_TRACEBACK=1 shows more), "
            "or uninstall it"
        ) from error


def package_of(point: EntryPoint) -> str:
    """Return the name of the package that a plugin is from."""
    return _name(point.dist) if point.dist else "unknown package"


_name = lru_cache(attrgetter("name"))  # which parses the metadata each time


def told(error: BaseException) -> str:
    """Return what an error says, and the file and line where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    trace = extract_tb(error.__traceback__)[1:]  # without `explained`, importlib, wandb's sys.exit
    frames = [f for f in trace if "importlib" not in f.filename and f.name != "exit"]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    exits = f"it calls sys.exit({error})" if isinstance(error, SystemExit) else ""
    return f"{exits or str(error) or type(error).__name__}{where}"
