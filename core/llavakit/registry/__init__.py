"""Finds installed plugins and looks their components up by name."""

from llavakit.registry.components import KindT, Registry, all_kinds, kind_of, texts_in
from llavakit.registry.step_paths import LATER, StepFolders

__all__ = ["LATER", "KindT", "Registry", "StepFolders", "all_kinds", "kind_of", "texts_in"]
