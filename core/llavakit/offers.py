"""What a hook returns: components as classes, or by name with the place to import them from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, TypeVar

from llavakit.contracts.component import Component, Options
from llavakit.contracts.errors import PluginError

KindT = TypeVar("KindT", bound=Component)


@dataclass(frozen=True)
class Offer:
    """A component that a plugin offers, imported when it is first used."""

    plugin: str
    name: str
    source: type[Component] | str
    """The class, or its place: `package.module:Class`."""

    @property
    def path(self) -> str:
        """Where the class is, with dots."""
        return (
            self.source.replace(":", ".") if isinstance(self.source, str) else path_of(self.source)
        )

    def same_as(self, other: Offer) -> bool:
        """Say whether both are one class."""
        if isinstance(self.source, str) or isinstance(other.source, str):
            return self.path == other.path
        return self.source is other.source

    def load(self, kind: type[KindT]) -> type[KindT]:
        """Return the class. Raises PluginError where it cannot be imported, or is another."""
        if not isinstance(self.source, str):
            return _checked(self.plugin, self.source, kind)
        with explained(self.plugin, f"its {kind.__name__} `{self.name}`"):
            found = resolve_name(self.source)
        component = _checked(self.plugin, found, kind)
        if component.name != self.name:
            raise PluginError(
                f"{self.path} of {self.plugin} is called `{component.name}`, but its hook says "
                f"`{self.name}`; give both one name"
            )
        return component


def offers_of(plugin: str, returned: object, kind: type[Component]) -> Iterator[Offer]:
    """Yield what a hook's return value offers.

    That is a sequence of classes, or a mapping of names to places, `package.module:Class`.
    Raises PluginError for anything else.
    """
    if isinstance(returned, Mapping):
        for name, place in returned.items():
            if not (isinstance(place, str) and place.count(":") == 1):
                raise PluginError(
                    f"the hook of {plugin} gives {place!r} for its {kind.__name__} `{name}`; write "
                    "it as package.module:Class"
                )
            yield Offer(plugin, str(name), place)
        return
    if not isinstance(returned, Iterable):
        raise PluginError(
            f"plugin {plugin} cannot load its {kind.__name__} components: its hook returned "
            f"{returned!r}; return a list of classes"
        )
    for component in returned:
        known = _checked(plugin, component, kind)
        yield Offer(plugin, known.name, known)


def _checked(plugin: str, component: Any, kind: type[KindT]) -> type[KindT]:
    if not (isinstance(component, type) and issubclass(component, kind)):
        raise PluginError(f"{path_of(component)} of {plugin} is not a {kind.__name__}")
    if not isinstance(getattr(component, "name", None), str):
        raise PluginError(f"{path_of(component)} of {plugin} has no `name`; give it one")
    if missing := ", ".join(f"`{name}`" for name in sorted(component.__abstractmethods__)):
        raise PluginError(
            f"{path_of(component)} of {plugin} lacks {missing}, which every {kind.__name__} has"
        )
    if not (isinstance(component.Options, type) and issubclass(component.Options, Options)):
        raise PluginError(
            f"`Options` of {path_of(component)} of {plugin} must derive from llavakit.Options"
        )
    return component


@contextmanager
def explained(plugin: str, what: str) -> Iterator[None]:
    """Say of an error whose it is, whatever it is."""
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(
            f"plugin {plugin} cannot load {what}: {error}; install what it needs, or uninstall it"
        ) from error


def path_of(component: object) -> str:
    """Return where a class is, with dots."""
    name = getattr(component, "__qualname__", None)
    return f"{getattr(component, '__module__', '')}.{name}" if name else repr(component)
