"""What every component has in common: a name, options, and a recipe's choice of one.

Nothing here imports torch, so recipes and plugins can be listed without it.
"""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr, ValidationInfo


class Options(BaseModel):
    """Options of one component, as a recipe states them. Unknown keys are errors."""

    # frozen: all built of them share them
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def alone(self) -> Self:
        """Return options of the same network that name no file or model elsewhere.

        So a model folder describes networks that others are made of: their weights are in it.
        """
        return self


class Component(ABC):
    """Something a recipe can name. Every kind derives from this."""

    hook: ClassVar[str]  #: The hook that collects this kind; set once by each abstract kind.
    name: ClassVar[str]  #: The name a recipe uses, unique within the kind.
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Any = None) -> None:
        """Keep the options; one that needs more when it is built has an `__init__` of its own."""
        vars(self)["options"] = options  # of a type that each component knows best

    @classmethod
    def missing(cls, options: Any) -> str | None:
        """Return one sentence on what must be fetched before it can be built, or None."""
        return None


KindT_co = TypeVar("KindT_co", bound=Component, covariant=True)


class Use(BaseModel, Generic[KindT_co]):
    """A recipe's choice of one component: `{ use = "clip", layer = -2 }`.

    Written `Use[Kind]`, or `Use["Kind"]` where the kind's module imports torch.
    """

    model_config = ConfigDict(extra="allow", frozen=True)  # only the component knows its options

    use: str
    _checked: Options | None = PrivateAttr(default=None)  # see Registry.options

    @property
    def options(self) -> dict[str, Any]:
        """The options beside `use`, unchecked."""
        return dict(self.model_extra or {})  # a copy: the choice itself is frozen


class SkippableUse(Use[KindT_co], Generic[KindT_co]):
    """A choice that a recipe may also leave out: `{ use = "pope", skip = true }`."""

    skip: bool = False


def _resolve(value: object, info: ValidationInfo) -> object:
    """Turn `@step/file` into a path; a component checked on its own has no steps around it."""
    resolve = (info.context or {}).get("resolve")
    return value if resolve is None or not isinstance(value, str) else resolve(value)


INPUT_MARK = BeforeValidator(_resolve)
InputPath = Annotated[Path, INPUT_MARK]
"""A file or folder to read: from the working directory, or `@step/file` of an earlier step."""

MODEL_MARK = "a model"
ModelPath = Annotated[Path, INPUT_MARK, MODEL_MARK]
"""An `InputPath` of a model folder, of any layout; or a model's name in a public collection."""
