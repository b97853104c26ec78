"""Finds installed plugins and looks their components up by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar, cast

import pluggy

from llavakit.contracts import hooks
from llavakit.contracts.component import Component, Options, Use
from llavakit.contracts.errors import PluginError, RecipeError, did_you_mean
from llavakit.registry.choices import StepFolders, kind_of, step_path, texts_in
from llavakit.registry.entry_points import INSTALL, entry_points, explained, imported, package_of
from llavakit.registry.installed import check_hooks, no_exit, wanted, warn_once

KindT = TypeVar("KindT", bound=Component)
ComponentT = TypeVar("ComponentT", bound=Component)
OptionsT = TypeVar("OptionsT", bound=Options)


class Registry:
    """The components of every registered plugin."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._manager = manager
        self._found: dict[str, dict[str, _Offer]] = {}
        self._origins: dict[str, tuple[str, str]] = {}
        # a plugin given by hand is the one being written: its faults are raised
        self._spares = False
        self.broken: dict[str, PluginError] = {}  #: Of installed plugins; the cause has its trace.

    @classmethod
    def installed(cls) -> Registry:
        """Return one of the installed plugins, or those LLAVA_PLUGINS names; broken ones warn."""
        registry = cls.empty()
        registry._spares = True
        for point in wanted(entry_points(group=hooks.PROJECT)):
            origin = package_of(point)
            # two packages may give one name, and pluggy would drop the second in silence
            name = f"{origin}:{point.name}"
            registry._origins[name] = (origin, point.dist.version if point.dist else "")
            with registry._sparing(name):
                registry.register(imported(point), name=name)
        return registry

    @contextmanager
    def _sparing(self, plugin: str) -> Iterator[None]:
        """Go on without what is broken of an installed plugin; raise it for one given by hand."""
        try:
            yield
        except PluginError as error:
            if not self._spares:
                raise
            self.broken.setdefault(plugin, error)
            warn_once(str(error), error.__cause__)

    @classmethod
    def empty(cls) -> Registry:
        manager = pluggy.PluginManager(hooks.PROJECT)
        manager.add_hookspecs(hooks)
        return cls(manager)

    def register(self, plugin: object, *, name: str | None = None) -> None:
        """Add a plugin: a module or object with `@hookimpl` functions."""
        check_hooks(plugin, str(name or plugin))
        try:
            self._manager.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"plugin {name or plugin} cannot be registered: {error}") from error
        self._found.clear()  # it may offer what was already collected

    def get(self, kind: type[KindT], name: str) -> type[KindT]:
        """Return the component of this kind and name."""
        found = self._offers(kind)
        if name not in found:
            hint = did_you_mean(name, found, f"installed: {', '.join(found)}")
            broken = "".join(f"; {error}" for error in self.broken.values())
            raise RecipeError(f"no {kind.__name__} is called `{name}`; {hint}{broken}")
        return found[name].load(kind)

    def chosen(self, use: Use[KindT]) -> type[KindT]:
        """Return the component that a recipe chose."""
        return self.get(cast("type[KindT]", kind_of(use)), use.use)

    def all(self, kind: type[KindT]) -> dict[str, type[KindT]]:
        """Return every component of a kind that can be used, by name. Imports all of them."""
        found = {}
        for name, offer in self._offers(kind).items():
            with self._sparing(offer.plugin):
                found[name] = offer.load(kind)
        return found

    def options(self, use: Use[Any], steps: StepFolders | None = None) -> Any:
        """Return the options of a choice, checked. Raises pydantic's ValidationError.

        They are kept with the choice, so that nothing is checked twice, unless they name earlier
        steps, `@step/file`: those depend on `steps`.
        """
        known = self.chosen(use).Options
        if type(use._checked) is known:  # another registry may have another component of that name
            return use._checked
        options = self.read(known, use.options, steps)
        if not any(text.startswith("@") for text in texts_in(use.options)):
            use._checked = options
        return options

    @staticmethod
    def read(
        known: type[OptionsT], table: Mapping[str, Any], steps: StepFolders | None = None
    ) -> OptionsT:
        """Return options of a type, checked. Raises pydantic's ValidationError."""
        return known.model_validate(table, context={"resolve": partial(step_path, folders=steps)})

    def build(self, use: Use[KindT], /, steps: StepFolders | None = None, **context: Any) -> KindT:
        """Return the component that a recipe chose, built with its options.

        `steps` are the folders that `@step/file` in the options refers to. A component that is made
        of others takes `build`, the same function for its own choices unless `context` has another;
        `progress`, to show how far it is, and `patches` are given to those that take them.
        A network has the weights that it names, or those its `save` wrote to `folder`; with
        `shapes=True` nothing is read: of these only the shapes are right.
        """
        return self.make(self.chosen(use), self.options(use, steps), steps, **context)

    def make(
        self,
        component: type[ComponentT],
        options: Options,
        steps: StepFolders | None = None,
        *,
        folder: Path | None = None,
        shapes: bool = False,
        **context: Any,
    ) -> ComponentT:
        """Return a component, known by its class, with checked options."""
        factory = cast("Callable[..., ComponentT]", component)
        if folder is not None:  # its parts are shapes, until it reads them
            load: Any = cast("Any", component).load
            factory, shapes = lambda options, **more: load(options, folder, **more), True
        elif not shapes:
            # networks read weights there, others just are
            factory = getattr(component, "create", component)
        # asked, not tried: a TypeError may come from within
        takes = signature(component.__init__).parameters
        told = {name: context.pop(name) for name in ("progress", "patches") if name in context}
        own = context.pop("build", None)
        if "build" in takes:
            context["build"] = own or partial(self.build, steps=steps, shapes=shapes, **told)
        context |= {name: value for name, value in told.items() if name in takes}
        try:
            # before it runs, so that its own TypeErrors stay its own
            signature(component).bind(options, **context)
        except TypeError as error:
            given = ", ".join(("options", *(f"{name}=" for name in context)))
            raise PluginError(
                f"{_path_of(component)} is built as {component.__name__}({given}), which its "
                f"`__init__` does not take: {error}"
            ) from error
        with no_exit(f"component {_path_of(component)}"):
            return factory(options, **context)

    def origins(self, kind: type[Component] | str) -> dict[str, tuple[str, str]]:
        """Return the package and version of each component of a kind, or of one by its name."""
        return {
            name: self._origins.get(offer.plugin, ("", ""))
            for name, offer in self._offers(kind).items()
        }

    def _offers(self, kind: type[Component] | str) -> dict[str, _Offer]:
        name = kind if isinstance(kind, str) else kind.__name__
        if name not in self._found:
            self._found[name] = self._collect(name)
        return self._found[name]

    def _collect(self, kind: str) -> dict[str, _Offer]:
        if kind not in hooks.KINDS:
            raise PluginError(f"no entry point of `llavakit.kinds` names {kind}; {INSTALL}")
        found: dict[str, _Offer] = {}
        for implementation in getattr(self._manager.hook, hooks.KINDS[kind][0]).get_hookimpls():
            plugin = implementation.plugin_name
            offers: tuple[_Offer, ...] = ()
            failed = f"plugin {plugin} cannot load its {kind} components"
            with self._sparing(plugin), explained(failed):
                offers = tuple(_offers_of(plugin, implementation.function(), kind))
            for offer in offers:
                other = found.setdefault(offer.name, offer)
                if not offer.same_as(other):  # who asks for that name is told; all others go on
                    found[offer.name] = replace(offer, rival=other)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Offer:
    """A component that a plugin offers, imported when it is first used."""

    plugin: str
    name: str
    source: type[Component] | str  #: The class, or where it is: `package.module:Class`.
    rival: _Offer | None = None  #: Another plugin's component of the same name: neither is used.

    @property
    def path(self) -> str:
        """Where the class is, with dots."""
        text = self.source if isinstance(self.source, str) else _path_of(self.source)
        return text.replace(":", ".")

    def same_as(self, other: _Offer) -> bool:
        """Say whether both are one class."""
        named = isinstance(self.source, str) or isinstance(other.source, str)
        # a place and a class are compared without an import
        return self.path == other.path if named else self.source is other.source

    def load(self, kind: type[KindT]) -> type[KindT]:
        """Return the class. Raises PluginError where it cannot be imported, or is another."""
        if (other := self.rival) is not None:
            raise PluginError(
                f"{self.path} of {self.plugin} and {other.path} of {other.plugin} are both called "
                f"`{self.name}`; uninstall one of them"
            )
        if not isinstance(self.source, str):
            return _checked(self.plugin, self.source, kind)
        with explained(f"plugin {self.plugin} cannot load its {kind.__name__} `{self.name}`"):
            found = resolve_name(self.source)
        component = _checked(self.plugin, found, kind)
        if component.name != self.name:
            raise PluginError(
                f"{self.path} of {self.plugin} is called `{component.name}`, but its hook says "
                f"`{self.name}`; give both one name"
            )
        return component


def _offers_of(plugin: str, returned: object, kind: str) -> Iterator[_Offer]:
    """Yield what a hook's return value offers.

    That is a sequence of classes, or a mapping of names to import paths, `package.module:Class`.
    Raises PluginError for anything else.
    """
    if isinstance(returned, Mapping):
        for name, path in returned.items():
            if not (isinstance(path, str) and path.count(":") == 1):
                raise PluginError(
                    f"the hook of {plugin} gives {path!r} for its {kind} `{name}`; write it as "
                    "package.module:Class"
                )
            yield _Offer(plugin, str(name), path)
        return
    if not isinstance(returned, Iterable):
        raise PluginError(
            f"plugin {plugin} cannot load its {kind} components: its hook returned {returned!r}; "
            "return a list of classes"
        )
    for component in returned:
        known = _checked(plugin, component, kind_of(kind))
        yield _Offer(plugin, known.name, known)


def _checked(plugin: str, component: Any, kind: type[KindT]) -> type[KindT]:
    whose = f"{_path_of(component)} of {plugin}"
    if not (isinstance(component, type) and issubclass(component, kind)):
        raise PluginError(f"{whose} is not a {kind.__name__}")
    if not isinstance(getattr(component, "name", None), str):
        raise PluginError(f"{whose} has no `name`; give it one")
    if missing := ", ".join(f"`{name}`" for name in sorted(component.__abstractmethods__)):
        raise PluginError(f"{whose} lacks {missing}, which every {kind.__name__} has")
    if not (isinstance(component.Options, type) and issubclass(component.Options, Options)):
        raise PluginError(f"`Options` of {whose} must derive from llavakit.Options")
    return component


def _path_of(component: object) -> str:
    """Return where a class is, with dots."""
    name = getattr(component, "__qualname__", None)
    return f"{getattr(component, '__module__', '')}.{name}" if name else repr(component)
