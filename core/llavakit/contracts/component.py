"""What every component has in common: a name, options, and a recipe's choice of one.

Nothing here imports torch, so recipes and plugins can be listed without it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr, ValidationInfo

from llavakit.contracts.errors import did_you_mean


class Options(BaseModel):
    """Options of one component, as a recipe states them. Unknown keys are errors."""

    # frozen: a choice and all built of it share them
    model_config = ConfigDict(extra="forbid", frozen=True)

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


StepFolders = Mapping[str, Path]  #: Folders of earlier steps, by their names in a recipe.


def _resolve(value: object, info: ValidationInfo) -> object:
    """Turn `@step/file` into a path below the folder of that earlier step."""
    if not isinstance(value, str):
        return value
    # asking the system for such a name raises, where others are just not there
    if "\0" in value or len(value) > 4000 or max(map(len, value.encode().split(b"/"))) > 255:
        raise ValueError("no file can have this name")
    if not value.startswith("@"):
        return value
    folders: StepFolders | None = (info.context or {}).get("steps")
    if folders is None:  # no recipe around it: a component checked on its own
        return value
    name, _, rest = value[1:].partition("/")
    if name not in folders:
        there = f"earlier: {', '.join(folders)}" if folders else "no step comes before this one"
        hint = did_you_mean(name, folders, there, "@{}".format)
        raise ValueError(f"no earlier step is called `{name}`; {hint}")
    # a recipe from elsewhere must not read the files beside a run
    if ".." in Path(rest).parts or Path(rest).is_absolute():
        raise ValueError(f"`{value}` leaves the folder of its step")
    return value if folders[name] is LATER else folders[name] / rest


INPUT_MARK = BeforeValidator(_resolve)
InputPath = Annotated[Path, INPUT_MARK]
"""A file or folder to read: from the working directory, or `@step/file` of an earlier step."""

MODEL_MARK = "a model"
ModelPath = Annotated[Path, INPUT_MARK, MODEL_MARK]
"""An `InputPath` of a model folder, of any layout; or a model's name in a public collection."""

LATER = Path("@")  #: Stands for the folder of a step that has not run, while a recipe is checked.
