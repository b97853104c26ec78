"""What holds for a component of any kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from llavakit.contracts.component import Component
from llavakit.registry import Registry

KindT = TypeVar("KindT", bound=Component)


class Contract(Generic[KindT]):
    """Checks what every component promises."""

    kind: ClassVar[type[Component]]

    @property
    def options(self) -> Mapping[str, Any]:
        """What `build` gives as options, as a recipe states them, where not the defaults.

        A subclass may set it as a plain attribute.
        """
        return {}

    def build(self) -> KindT:
        """Return a small instance: no download, fast on a CPU, the same one each time."""
        # not abstract: pytest passes abstract classes over without a word
        raise AssertionError(f"{type(self).__name__} has no `build`; return a small component")

    def stated(self) -> Any:
        """Return `options` as the component's own Options."""
        component = type(self.build())
        try:
            return component.Options(**self.options)
        except ValidationError as error:
            raise AssertionError(
                f"set `options` of {type(self).__name__} to what `build` uses: {error}"
            ) from error

    def test_it_is_a_whole_component_of_its_kind(self) -> None:
        component = self.build()
        assert isinstance(component, self.kind), f"it is no {self.kind.__name__}"
        assert isinstance(component.name, str), "`name` is the text a recipe uses"
        assert component.name, "`name` is empty"
        assert inspect.getdoc(type(component)), "say in a docstring what it is"

    def test_options_are_frozen_and_refuse_unknown_keys(self) -> None:
        options = type(self.build()).Options
        assert options.model_config.get("frozen"), "Options must be frozen"
        try:
            options(**{**self.options, "no_such_option": 1})
        except ValidationError as error:
            refused = {
                item["loc"][0] for item in error.errors() if item["type"] == "extra_forbidden"
            }
            assert "no_such_option" in refused, "unknown options must be refused"
            return
        raise AssertionError("unknown options must be refused: derive from llavakit.Options")

    def test_registered_by_an_installed_plugin(self) -> None:
        component = type(self.build())
        found = Registry.installed().get(self.kind, component.name)
        assert found is component, f"`{component.name}` is {found}, not {component}"
