"""`llava-run plugins`: lists the installed components by kind, and what is broken of plugins.

`llava-run plugins NAME`: what a component is, and its options.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Mapping
from typing import Any

from llavakit.contracts.commands import GROUP, Commands


def add(commands: Commands) -> None:
    plugins = commands.add_parser("plugins", help="list the installed components by kind")
    plugins.add_argument(
        "name", nargs="?", metavar="NAME", help="show what one is, and its options"
    )
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.add_argument(
        "--traceback", action="store_true", help="show where each broken plugin failed"
    )
    plugins.set_defaults(command=_plugins)


def _plugins(arguments: argparse.Namespace) -> int:
    import json
    import logging

    from llavakit import printable_json, shown

    if arguments.name is not None:
        return _describe(arguments.name, as_json=arguments.json)
    log = logging.getLogger("llavakit")
    before = log.level
    log.setLevel(logging.ERROR)  # what is broken is in the list itself
    try:
        found, broken = _look(arguments.broken)
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


def _describe(name: str, *, as_json: bool) -> int:
    """Print every component of this name, of whatever kind."""
    import inspect
    import json
    from dataclasses import asdict

    from llavakit import RecipeError, Registry, did_you_mean, kind_of, printable_json, shown
    from llavakit.contracts.hooks import KINDS
    from llavakit_plugins.scaffolding.options import options_of

    registry = Registry.installed()
    names = {kind: registry.origins(kind) for kind in KINDS}
    kinds = [kind for kind, known in names.items() if name in known]
    if not kinds:
        every = sorted({one for known in names.values() for one in known})
        hint = did_you_mean(name, every, "llava-run plugins lists all")
        raise RecipeError(f"no component is called `{name}`; {hint}")
    found = []
    for kind in kinds:
        component = registry.get(kind_of(kind), name)
        options = options_of(component.Options)
        package, version = names[kind][name]
        text = (inspect.getdoc(component) or "").partition("\n\n")[0]
        found.append({"kind": kind, "name": name, "package": package, "version": version,
                      "text": text, "options": [asdict(option) for option in options]})  # fmt: skip
        if as_json:
            continue
        print(shown(f"{kind} {name}  ({package} {version})\n{text}"))
        width = max((len(option.name) for option in options), default=0)
        for option in options:
            default = f"; default {option.default}" if option.default else "; must be given"
            print(shown(f"\n  {option.name:{width}}  {option.takes}{default}".replace("`", "")))
            if option.text:
                print(shown(f"  {'':{width}}  {option.text}"))
        print()
    if as_json:
        print(printable_json(json.dumps(found, indent=2)))
    return 0


def _look(
    commands: Mapping[str, Exception],
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return the components of each kind, and the plugins and `commands` that are broken."""
    from importlib.metadata import entry_points

    from llavakit import Registry, kind_of
    from llavakit.contracts.hooks import KINDS, PROJECT

    registry = Registry.installed()
    # built-in components alone are known to work; to import them takes torch, and seconds
    others = any(p.dist is None or p.dist.name != PROJECT for p in entry_points(group=PROJECT))
    kinds = {kind: registry.origins(kind) for kind in KINDS}
    usable: Mapping[str, Container[str]] = kinds
    if others:
        usable = {kind: registry.all(kind_of(kind)) for kind in KINDS}
    found: dict[str, list[dict[str, Any]]] = {
        kind: [
            {"name": name, "package": package, "version": version}
            for name, (package, version) in sorted(origins.items())
            if name in usable[kind]
        ]
        for kind, origins in kinds.items()
    }
    faults: list[tuple[str, Exception]] = [*registry.broken.items()]
    for command, fault in commands.items():
        point = next(iter(entry_points(group=GROUP, name=command)))
        faults.append((f"{point.dist.name if point.dist else ''}:{command}", fault))
    broken = []
    for plugin, fault in faults:
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

    # the cause is the plugin's own error; ours around it only adds frames
    return "".join(traceback.format_exception(error.__cause__ or error)).rstrip()
