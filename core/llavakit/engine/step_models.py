"""The model as it stands before a step: the newest that an earlier step left, else a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit.contracts.component import Use
from llavakit.engine.distributed import Device
from llavakit.engine.step_folders import set_aside
from llavakit.recipe.files import link_folder
from llavakit.recipe.model_choice import is_model
from llavakit.recipe.recipe import Recipe
from llavakit.registry import Registry

if TYPE_CHECKING:
    from llavakit.contracts.networks import LanguageModel, VisionEncoder
    from llavakit.model.llava import LlavaModel


def newest_model(folders: Mapping[str, Path]) -> Path | None:
    """Return the model folder that the latest of the steps left, if any did."""
    found = [folder / "model" for folder in folders.values() if is_model(folder / "model")]
    return max(found, key=lambda path: path.parent.name, default=None)  # begins with its number


def link_newest(directory: Path, folders: Mapping[str, Path]) -> None:
    """Point `model` at the last step's model, relatively, so that the run can be moved."""
    if (newest := newest_model(folders)) is None:
        return
    link = directory / "model"
    if link.exists() and not link.is_symlink():  # a folder of the user's own
        set_aside(link)
    link_folder(link, newest)


@dataclass(frozen=True)
class StepModel:
    """The model before a step, made when it is asked for: steps without networks need no torch."""

    recipe: Recipe
    registry: Registry
    folders: Mapping[str, Path]
    device: Device

    @property
    def vision(self) -> Use[VisionEncoder]:
        return self.recipe.parts().vision

    @property
    def language(self) -> Use[LanguageModel]:
        return self.recipe.parts().language

    def __call__(self, folder: Path | None = None, **given: Any) -> LlavaModel:
        from llavakit.model.load import load, trainable

        folder = folder or newest_model(self.folders)
        given.setdefault("device", self.device.find())
        if folder is None:
            return self.new(**given)
        return trainable(load(folder, registry=self.registry, **given), folder)

    def new(
        self, vision: VisionEncoder | None = None, language: LanguageModel | None = None, **how: Any
    ) -> LlavaModel:
        from llavakit.model.folder import create_model

        given: dict[str, Any] = {"vision": vision, "language": language}
        seed, device = self.recipe.seed, how.get("device") or self.device.find()
        return create_model(self.recipe.parts(), self.registry, seed=seed, device=device, **given)
