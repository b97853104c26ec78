"""Finds installed plugins and looks their components up by name."""

from llavakit.registry.choices import LATER, StepFolders, all_kinds, kind_of, texts_in
from llavakit.registry.components import KindT, Registry

__all__ = ["LATER", "KindT", "Registry", "StepFolders", "all_kinds", "kind_of", "texts_in"]
