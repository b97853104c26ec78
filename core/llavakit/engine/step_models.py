"""The model as it stands before a step: the newest that an earlier step left, else a new one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit.contracts.component import Use
from llavakit.engine.distributed import Device
from llavakit.engine.step_folders import set_aside
from llavakit.files import link_folder
from llavakit.recipe.model_choice import is_model
from llavakit.recipe.recipe import Recipe
from llavakit.registry import Registry

if TYPE_CHECKING:
    from llavakit.contracts.networks import LanguageModel, VisionEncoder
    from llavakit.model.llava import LlavaModel


def newest_model(folders: Mapping[str, Path]) -> Path | None:
    """Return the model folder that the latest of the steps left, if any did."""
    found = [folder / "model" for folder in folders.values() if is_model(folder / "model")]
    return max(found, key=lambda path: path.parent.name, default=None)


def link_newest(directory: Path, folders: Mapping[str, Path]) -> None:
    """Point `model` at the last step's model, relatively, so that the run can be moved."""
    newest = newest_model(folders)
    if newest is None:
        return
    link = directory / "model"
    if link.exists() and not link.is_symlink():
        set_aside(link)
    link_folder(link, newest)


class StepModel:
    """The model before a step, made when it is asked for: steps without networks need no torch."""

    def __init__(
        self, recipe: Recipe, registry: Registry, folders: Mapping[str, Path], device: Device
    ) -> None:
        self._recipe, self._registry, self._folders = recipe, registry, folders
        self._device = device

    @property
    def vision(self) -> Use[VisionEncoder]:
        return self._recipe.parts().vision

    @property
    def language(self) -> Use[LanguageModel]:
        return self._recipe.parts().language

    def __call__(self, folder: Path | None = None, **given: Any) -> LlavaModel:
        from llavakit.model.load import load, trainable

        folder = folder or newest_model(self._folders)
        if folder is None:
            return self.new()
        device = self._device.find()
        return trainable(load(folder, registry=self._registry, device=device, **given), folder)

    def new(
        self, vision: VisionEncoder | None = None, language: LanguageModel | None = None
    ) -> LlavaModel:
        from llavakit.model.folder import create_model

        return create_model(
            self._recipe.parts(),
            self._registry,
            seed=self._recipe.seed,
            device=self._device.find(),
            vision=vision,
            language=language,
        )
