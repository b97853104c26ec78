"""Finds installed plugins and looks their components up by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib.metadata import entry_points
from inspect import signature
from typing import Any, TypeVar, cast

import pluggy

from llavakit import hooks
from llavakit.components import Component, StepFolders, Use
from llavakit.errors import PluginError, RecipeError

KindT = TypeVar("KindT", bound=Component)
ComponentT = TypeVar("ComponentT", bound=Component)


class Registry:
    """The components of every registered plugin."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._manager = manager
        self._components: dict[str, dict[str, type[Component]]] = {}
        self._origins: dict[str, tuple[str, str]] = {}

    @classmethod
    def installed(cls) -> Registry:
        """Return a registry of every plugin installed in this environment."""
        registry = cls.empty()
        for entry_point in entry_points(group=hooks.PROJECT):
            origin = entry_point.dist.name if entry_point.dist else "unknown package"
            try:
                plugin = entry_point.load()
            except Exception as error:
                raise PluginError(
                    f"plugin `{entry_point.name}` of {origin} failed to import: {error}"
                ) from error
            name = f"{origin}:{entry_point.name}"
            registry.register(plugin, name=name)
            version = entry_point.dist.version if entry_point.dist else ""
            registry._origins[name] = (origin, version)
        return registry

    @classmethod
    def empty(cls) -> Registry:
        manager = pluggy.PluginManager(hooks.PROJECT)
        manager.add_hookspecs(hooks)
        return cls(manager)

    def register(self, plugin: object, *, name: str | None = None) -> None:
        """Add a plugin: a module or object with `@hookimpl` functions."""
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"plugin {name or plugin} cannot be registered: {error}") from error
        self._components.clear()

    def get(self, kind: type[KindT], name: str) -> type[KindT]:
        """Return the component of this kind and name."""
        found = self.all(kind)
        if name not in found:
            close = get_close_matches(name, found, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"installed: {', '.join(found)}"
            raise RecipeError(f"no {kind.__name__} is called `{name}`; {hint}")
        return found[name]

    def all(self, kind: type[KindT]) -> dict[str, type[KindT]]:
        """Return every component of a kind, by name."""
        if kind.hook not in self._components:
            self._components[kind.hook] = self._collect(kind)
        return self._components[kind.hook]  # type: ignore[return-value]

    def build(self, use: Use[KindT], /, steps: StepFolders | None = None, **context: Any) -> KindT:
        """Return the component that a recipe chose, built with its options.

        `steps` are the folders that `@step/file` in the options refers to. A component that is made
        of others takes `build`, the same function for its own choices; one that takes long to build
        takes `progress`, to show how far it is, where there is one.
        """
        component = self.get(cast("type[KindT]", use.kind()), use.use)
        return self.make(component, use.options, steps, **context)

    def make(
        self,
        component: type[ComponentT],
        stated: Mapping[str, Any],
        steps: StepFolders | None = None,
        **context: Any,
    ) -> ComponentT:
        """Return a component, known by its class, with the options that are stated."""
        factory = cast("Callable[..., ComponentT]", component)
        options = component.Options.model_validate(stated, context={"steps": steps})
        takes = signature(component.__init__).parameters
        shown = {"progress": context.pop("progress")} if "progress" in context else {}
        if "build" in takes:
            context["build"] = partial(self.build, steps=steps, **shown)
        if "progress" in takes:
            context |= shown
        return factory(options, **context)

    def origins(self, kind: type[Component]) -> dict[str, tuple[str, str]]:
        """Return the package and version that each component of a kind comes from."""
        found: dict[str, tuple[str, str]] = {}
        for plugin, components in self._implementations(kind):
            for component in components:
                found[component.name] = self._origins.get(plugin, ("", ""))
        return found

    def _collect(self, kind: type[Component]) -> dict[str, type[Component]]:
        found: dict[str, type[Component]] = {}
        for plugin, components in self._implementations(kind):
            for component in components:
                if not (isinstance(component, type) and issubclass(component, kind)):
                    raise PluginError(f"{_path(component)} of {plugin} is not a {kind.__name__}")
                if not isinstance(getattr(component, "name", None), str):
                    raise PluginError(f"{_path(component)} of {plugin} has no `name`; give it one")
                other = found.setdefault(component.name, component)
                if other is not component:
                    raise PluginError(
                        f"{_path(component)} and {_path(other)} are both called "
                        f"`{component.name}`; uninstall one of them"
                    )
        return dict(sorted(found.items()))

    def _implementations(
        self, kind: type[Component]
    ) -> Iterator[tuple[str, Sequence[type[Component]]]]:
        """Yield each plugin that adds to a kind, and what it adds."""
        for implementation in getattr(self._manager.hook, kind.hook).get_hookimpls():
            try:
                yield implementation.plugin_name, tuple(implementation.function())
            except PluginError:
                raise
            except Exception as error:  # whatever it is, say whose it is
                raise PluginError(
                    f"plugin {implementation.plugin_name} cannot load its {kind.__name__} "
                    f"components: {error}; install what it needs, or uninstall it"
                ) from error


def _path(component: object) -> str:
    name = getattr(component, "__qualname__", None)
    return f"{getattr(component, '__module__', '')}.{name}" if name else repr(component)
