"""The parts that a model is made of, as recipes and model folders name them."""

# Kinds in quotes, and no `annotations` of the future: a recipe without a model imports no torch.
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from llavakit.contracts.component import Use
from llavakit.contracts.interfaces import PromptTemplate
from llavakit.stream.tiling import Tiling

if TYPE_CHECKING:
    from llavakit.contracts.networks import Connector, LanguageModel, VisionEncoder

MANIFEST = "model.toml"  #: The file of a model folder that names the parts.
PARTS = ("vision", "connector", "language")


class StatedTable(BaseModel):
    """A table of a recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelRecipe(StatedTable):
    """The parts of the model."""

    vision: Use["VisionEncoder"]
    connector: Use["Connector"]
    language: Use["LanguageModel"]
    tiling: Use[Tiling] | None = None  #: None: the vision encoder's usual one.
    template: Use[PromptTemplate] | None = None  #: None: the language model's usual one.


def is_model(folder: Path) -> bool:
    """Say whether `folder` is a model folder of ours."""
    return (folder / MANIFEST).is_file()
