"""What holds for a component of any kind."""

from __future__ import annotations

import inspect
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from llavakit.contracts.component import Component
from llavakit.registry import Registry

KindT = TypeVar("KindT", bound=Component)


def hold(kept: object, promise: str, came: object, change: str) -> None:
    """Fail with what was promised, what came and what to change, unless it was kept."""
    if not kept:
        raise AssertionError(f"promised: {promise}\n    came: {came}\n  change: {change}")


@contextmanager
def holding(promise: str, change: str) -> Iterator[None]:
    """Turn whatever is raised within into a broken promise; the cause keeps its traceback."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        came = f"{type(error).__name__}: {str(error).strip():.600}"
        raise AssertionError(
            f"promised: {promise}\n    came: {came}\n  change: {change}"
        ) from error


class Contract(Generic[KindT]):
    """Checks what every component promises."""

    kind: ClassVar[type[Component]]
    options: Mapping[str, Any] = {}
    """What `build` gives as options, as a recipe states them, where not the defaults. A subclass
    states it, as an attribute or a property, or `build` sets it: `self.options = {...}`."""
    picklable: ClassVar[bool] = False  #: Whether the kind goes to worker processes.

    @cached_property
    def tmp_path(self) -> Path:
        """A folder of the test's own, for files that `build` needs; always the same in one test."""
        folder = tempfile.mkdtemp(prefix="llavakit-contract-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder).resolve()

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

    def unstated(self, what: str, otherwise: str) -> AssertionError:
        """Return the failure of a contract that was not told what to compare with."""
        return AssertionError(f"{type(self).__name__} has no `{what}`; {otherwise}")

    def test_it_is_a_whole_component_of_its_kind(self) -> None:
        component = self.build()
        kind = self.kind.__name__
        hold(
            isinstance(component, self.kind),
            f"a {kind}", f"{type(component).__name__}",
            f"derive it from llavakit.{kind}, and return an instance from `build`",
        )  # fmt: skip
        name = getattr(component, "name", None)
        hold(
            isinstance(name, str) and name,
            "`name` is the text that a recipe uses", repr(name), 'write `name = "mine"`',
        )  # fmt: skip
        hold(
            inspect.getdoc(type(component)),
            "a docstring that says what it is", "none", f"write one for {type(component).__name__}",
        )  # fmt: skip

    def test_options_are_frozen_and_refuse_unknown_keys(self) -> None:
        options = type(self.build()).Options
        change = "derive its Options from llavakit.Options and leave `model_config` alone"
        hold(options.model_config.get("frozen"), "Options are frozen", "they can be set", change)
        refused: set[object] = set()
        try:
            options(**{**self.options, "no_such_option": 1})
        except ValidationError as error:
            refused = {
                item["loc"][0] for item in error.errors() if item["type"] == "extra_forbidden"
            }
            others = refused - {"no_such_option"}
            hold(
                not others,
                f"`options` of {type(self).__name__} are what `build` uses",
                f"{type(self.build()).__name__} has no {sorted(map(str, others))}",
                "state the options of this component",
            )
        hold(
            "no_such_option" in refused,
            "unknown options are refused", "`no_such_option` was taken", change,
        )  # fmt: skip

    def test_registered_by_an_installed_plugin(self) -> None:
        component = type(self.build())
        with holding(
            f"a recipe finds `{component.name}`",
            "return the class from the hook of its kind, and name the module under `[project."
            "entry-points.llavakit]`, then install the package (pip install -e .)",
        ):
            found = Registry.installed().get(self.kind, component.name)
        hold(
            found is component,
            f"`{component.name}` is {component}", found, "give one of the two another name",
        )  # fmt: skip

    def test_it_can_go_to_another_process(self) -> None:
        if not self.picklable:
            hold(isinstance(self.build(), self.kind), f"a {self.kind.__name__}", "none", "build it")
            return
        with holding(
            "it can be pickled: worker processes get a copy",
            "keep no lambda, open file, lock or generator on `self`; open what you need where it "
            "is used, or write `__getstate__`",
        ):
            component = self.build()
            copy = pickle.loads(pickle.dumps(component))  # noqa: S301 - its own
        hold(
            type(copy) is type(component),
            "the copy is of the same class", type(copy), "fix its `__reduce__`",
        )  # fmt: skip
