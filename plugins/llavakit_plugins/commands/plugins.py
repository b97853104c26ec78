"""`llava-run plugins`: lists the installed components by kind."""

from __future__ import annotations

import argparse

from llavakit.contracts.commands import Commands


def add(commands: Commands) -> None:
    plugins = commands.add_parser("plugins", help="list the installed components by kind")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.set_defaults(command=_plugins)


def _plugins(arguments: argparse.Namespace) -> int:
    import json

    from llavakit import Registry, all_kinds, printable_json, shown

    registry = Registry.installed()
    for kind in all_kinds():
        registry.all(kind)  # two of one name, or a class of another kind, is an error here, too
    found = {
        kind.__name__: [
            {"name": name, "package": package, "version": version}
            for name, (package, version) in sorted(registry.origins(kind).items())
        ]
        for kind in all_kinds()
    }
    if arguments.json:
        print(printable_json(json.dumps(found, indent=2)))
        return 0
    for kind_name, components in found.items():
        print(kind_name)
        for item in components:
            print(shown(f"  {item['name']:20}{item['package']} {item['version']}"))
    return 0
