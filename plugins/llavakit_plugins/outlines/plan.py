"""The plan of a recipe whose networks are all built in, without PyTorch: in a fifth of the time.

Importing PyTorch and transformers takes seconds, for weights that are only counted. Whatever goes
beyond the outlines is planned with networks on the meta device, as every plan once was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from llavakit import LlavaError, Plan, Recipe, Registry, make_plan
from llavakit_plugins.outlines.model import outline_model
from llavakit_plugins.outlines.registry import OutlineRegistry
from llavakit_plugins.outlines.weights import NotPlain

_log = logging.getLogger("llavakit")
_STEPS = "llavakit_plugins.steps."  # those of other packages may ask a model for more


def plan_of(load: Callable[[Registry], Recipe]) -> Plan:
    """Return the plan of the recipe that `load` reads, with torch only where it must be."""
    try:
        return _outlined(load)
    except (NotPlain, LlavaError) as error:  # an error is told by what always told it
        _log.debug("this plan needs PyTorch: %s", error)
    registry = Registry.installed()
    return make_plan(load(registry), registry)


def _outlined(load: Callable[[Registry], Recipe]) -> Plan:
    registry = OutlineRegistry.installed()
    recipe = load(registry)
    for _, use in recipe.active_steps():
        step, options = registry.chosen(use), registry.options(use)
        if not step.__module__.startswith(_STEPS):
            raise NotPlain(f"step `{use.use}` is not built in")
        init: Path | None = getattr(options, "init", None)
        if init is not None and not init.as_posix().startswith("@"):
            raise NotPlain(f"step `{use.use}` starts from a folder")
        if getattr(options, "format", None) or getattr(options, "formats", None):
            raise NotPlain(f"step `{use.use}` writes another layout")  # which looks at networks
    return make_plan(recipe, registry, outline_model)
