"""Finds installed plugins and looks their components up by name."""

from llavakit.registry.components import KindT, Registry, all_kinds, kind_of, texts_in

__all__ = ["KindT", "Registry", "all_kinds", "kind_of", "texts_in"]
