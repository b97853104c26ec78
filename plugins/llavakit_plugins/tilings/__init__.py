"""The built-in tilings: one view, a base view with tiles (anyres), a plain grid of tiles, and
one view in an image's own proportions."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_tilings() -> Mapping[str, str]:
    return {
        "single": "llavakit_plugins.tilings.single:Single",
        "anyres": "llavakit_plugins.tilings.anyres:Anyres",
        "grid": "llavakit_plugins.tilings.grid:Grid",
        "native": "llavakit_plugins.tilings.native:Native",
    }
