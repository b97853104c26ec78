"""Generators of instruction data."""

from __future__ import annotations

from llavakit import Generator, hookimpl


@hookimpl
def llava_generators() -> list[type[Generator]]:
    from llavakit_plugins.generators.offline import Offline
    from llavakit_plugins.generators.prompted import Prompted

    return [Offline, Prompted]
