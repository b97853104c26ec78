"""Imports what a model is made of, in four fifths of the time that Python takes by itself."""

from __future__ import annotations

import gc
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llavakit import ModelRecipe, Registry


@contextmanager
def kept_imports() -> Iterator[None]:
    """Do not search for cycles while the block imports, and freeze what there is behind it.

    PyTorch and transformers make 700,000 objects that stay until the end. Python's search for
    cycles looks at all of them again and again while they come, and would again afterwards. For a
    program that ends with what it imports.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_parts(path: Path) -> None:
    """Import what `llavakit.load` will import for the model at `path`, and freeze it.

    Weights are read behind this: nothing of them is frozen.
    """
    import llavakit
    from llavakit import PARTS, Exporter, LlavaError, ModelRecipe, Registry, is_model

    with kept_imports():
        _ = llavakit.load  # and with it torch
        registry = Registry.installed()
        with suppress(LlavaError, OSError, ValueError, KeyError):  # `load` says what is wrong
            if is_model(path):
                manifest = tomllib.loads((path / "model.toml").read_text(encoding="utf-8-sig"))
                recipe = ModelRecipe.model_validate({part: manifest[part] for part in PARTS})
                for part in PARTS:
                    registry.chosen(getattr(recipe, part))
            else:
                registry.all(Exporter)  # the layouts, by which it is recognised
        if "transformers" in sys.modules:  # a part uses it, and will build one of its models
            import transformers.modeling_utils  # noqa: F401


def import_for_training(model: ModelRecipe | None, registry: Registry) -> None:
    """Import what the built-in networks of a recipe will be made of."""
    if model is None:
        return
    from llavakit_plugins.language.pretrained import PretrainedLanguage

    if issubclass(registry.chosen(model.language), PretrainedLanguage):
        import transformers.modeling_utils  # noqa: F401
