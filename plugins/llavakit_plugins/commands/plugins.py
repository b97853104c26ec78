"""`llava-run plugins`: lists the installed components by kind, and what is broken of plugins."""

from __future__ import annotations

import argparse
from typing import Any

from llavakit.contracts.commands import Commands


def add(commands: Commands) -> None:
    plugins = commands.add_parser("plugins", help="list the installed components by kind")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.add_argument(
        "--traceback", action="store_true", help="show where each broken plugin failed"
    )
    plugins.set_defaults(command=_plugins)


def _plugins(arguments: argparse.Namespace) -> int:
    import json
    import logging

    from llavakit import printable_json, shown

    log = logging.getLogger("llavakit")
    before = log.level
    log.setLevel(logging.ERROR)  # what is broken is in the list itself
    try:
        found, broken = _look()
    finally:
        log.setLevel(before)
    if arguments.json:
        print(
            printable_json(
                json.dumps({**found, **({"broken": broken} if broken else {})}, indent=2)
            )
        )
        return 0
    for kind_name, components in found.items():
        print(kind_name)
        for item in components:
            print(shown(f"  {item['name']:20}{item['package']} {item['version']}"))
    if broken:
        print("broken")
    for item in broken:
        print(shown(f"  {item['name']:20}{item['package']} {item['version']}: {item['error']}"))
        if arguments.traceback:
            print(shown(item["traceback"]))
    if broken and not arguments.traceback:
        print("  llava-run plugins --traceback shows where each failed")
    return 0


def _look() -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return the components of each kind, and the plugins that are broken."""
    from llavakit import Registry, all_kinds

    registry = Registry.installed()
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in all_kinds():
        usable = registry.all(kind)
        found[kind.__name__] = [
            {"name": name, "package": package, "version": version}
            for name, (package, version) in sorted(registry.origins(kind).items())
            if name in usable
        ]
    broken = []
    for plugin, fault in registry.broken.items():
        package, _, name = plugin.rpartition(":")
        broken.append(
            {
                "name": name,
                "package": package,
                "version": _version(package),
                "error": str(fault),
                "traceback": _traceback(fault),
            }
        )
    return found, broken


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except (PackageNotFoundError, ValueError):  # no package is known of the entry point
        return ""


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error.__cause__ or error)).rstrip()
