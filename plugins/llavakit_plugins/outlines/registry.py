"""Finds the outline in place of a built-in network. Without torch."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

from llavakit import Registry, Use
from llavakit_plugins.outlines.weights import NotPlain

_OUTLINES = {
    "llavakit_plugins.vision.clip.Clip": "llavakit_plugins.vision.outlines:ClipOutline",
    "llavakit_plugins.vision.siglip.Siglip": "llavakit_plugins.vision.outlines:SiglipOutline",
    "llavakit_plugins.language.vicuna.Vicuna": "llavakit_plugins.language.outlines:VicunaOutline",
    **{
        f"llavakit_plugins.connectors.{path}": f"llavakit_plugins.connectors.outlines:{name}"
        for path, name in (
            ("identity.Identity", "IdentityOutline"),
            ("mlp.Linear", "LinearOutline"),
            ("mlp.Mlp", "MlpOutline"),
            ("pool.Pool", "PoolOutline"),
        )
    },
}


class OutlineRegistry(Registry):
    """A registry for plans alone: networks are outlines, and NotPlain is raised for others."""

    def chosen(self, use: Use[Any]) -> Any:
        arguments = type(use).__pydantic_generic_metadata__["args"]
        if not (arguments and isinstance(arguments[0], str)):
            return super().chosen(use)
        # a kind in quotes: its module imports torch
        offer = self._offers(arguments[0]).get(use.use)
        if offer is None or offer.rival is not None or offer.path not in _OUTLINES:
            raise NotPlain(f"`{use.use}` has no outline")
        return resolve_name(_OUTLINES[offer.path])
