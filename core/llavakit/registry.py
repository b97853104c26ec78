"""Finds installed plugins and looks their components up by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from importlib.metadata import entry_points
from inspect import signature
from typing import Any, TypeVar, cast

import pluggy

from llavakit.contracts import hooks
from llavakit.contracts.component import Component, StepFolders, Use
from llavakit.contracts.errors import PluginError, RecipeError
from llavakit.offers import Offer, explained, offers_of, path_of

KindT = TypeVar("KindT", bound=Component)
ComponentT = TypeVar("ComponentT", bound=Component)


class Registry:
    """The components of every registered plugin."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._manager = manager
        self._found: dict[str, dict[str, Offer]] = {}
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
                    f"plugin `{entry_point.name}` of {origin} failed to import: {error}; mend it, "
                    f"or uninstall it (pip uninstall {origin})"
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
        known = [hook for hook in vars(hooks) if hook.startswith("llava_")]
        for hook in known:
            found = getattr(plugin, hook, None)
            if callable(found) and not hasattr(found, f"{hooks.PROJECT}_impl"):
                raise PluginError(
                    f"plugin {name or plugin} has a function `{hook}` that is no hook; write "
                    "@hookimpl above it"
                )
        self._found.clear()

    def get(self, kind: type[KindT], name: str) -> type[KindT]:
        """Return the component of this kind and name."""
        found = self._offers(kind)
        if name not in found:
            close = get_close_matches(name, found, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"installed: {', '.join(found)}"
            raise RecipeError(f"no {kind.__name__} is called `{name}`; {hint}")
        return found[name].load(kind)

    def has(self, kind: type[Component], name: str) -> bool:
        """Say whether there is a component of this kind and name, without importing it."""
        return name in self._offers(kind)

    def all(self, kind: type[KindT]) -> dict[str, type[KindT]]:
        """Return every component of a kind, by name. Imports all of them."""
        return {name: offer.load(kind) for name, offer in self._offers(kind).items()}

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
        try:
            signature(component).bind(options, **context)
        except TypeError as error:
            given = ", ".join(("options", *(f"{name}=" for name in context)))
            raise PluginError(
                f"{path_of(component)} is built as {component.__name__}({given}), which its "
                f"`__init__` does not take: {error}"
            ) from error
        return factory(options, **context)

    def origins(self, kind: type[Component]) -> dict[str, tuple[str, str]]:
        """Return the package and version that each component of a kind comes from."""
        return {
            name: self._origins.get(offer.plugin, ("", ""))
            for name, offer in self._offers(kind).items()
        }

    def _offers(self, kind: type[Component]) -> dict[str, Offer]:
        if kind.hook not in self._found:
            self._found[kind.hook] = self._collect(kind)
        return self._found[kind.hook]

    def _collect(self, kind: type[Component]) -> dict[str, Offer]:
        found: dict[str, Offer] = {}
        for implementation in getattr(self._manager.hook, kind.hook).get_hookimpls():
            plugin = implementation.plugin_name
            with explained(plugin, f"its {kind.__name__} components"):
                offers = tuple(offers_of(plugin, implementation.function(), kind))
            for offer in offers:
                other = found.setdefault(offer.name, offer)
                if not offer.same_as(other):
                    raise PluginError(
                        f"{offer.path} and {other.path} are both called `{offer.name}`; uninstall "
                        "one of them"
                    )
        return dict(sorted(found.items()))
