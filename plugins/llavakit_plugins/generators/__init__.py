"""The built-in generators of instruction data, by name."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_generators() -> Mapping[str, str]:
    return {
        "offline": "llavakit_plugins.generators.offline:Offline",
        "prompted": "llavakit_plugins.generators.prompted:Prompted",
    }
