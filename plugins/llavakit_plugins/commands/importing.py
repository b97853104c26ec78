"""Imports what a model is made of, in four fifths of the time that Python takes by itself."""

from __future__ import annotations

import gc
import sys
import tomllib
from contextlib import suppress
from pathlib import Path


def import_parts(path: Path) -> None:
    """Import what `llavakit.load` will import for the model at `path`, and freeze it.

    PyTorch and transformers make 700,000 objects that stay until the end. Python's search for
    cycles looks at all of them again and again while they come, and would again afterwards. Weights
    are read behind this: nothing of them is frozen. For a program that ends with its model.
    """
    gc.disable()
    try:
        _import_parts(path)
    finally:
        gc.freeze()
        gc.enable()


def _import_parts(path: Path) -> None:
    import llavakit
    from llavakit import PARTS, Exporter, LlavaError, ModelRecipe, Registry, is_model

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
