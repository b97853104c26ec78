"""`llava-run convert-recipe`: turns training scripts of LLaVA or TinyLLaVA into a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from llavakit.contracts.commands import Commands
from llavakit.contracts.errors import RecipeError


def add(commands: Commands) -> None:
    convert = commands.add_parser(
        "convert-recipe", help="turn a training script of LLaVA or TinyLLaVA into a recipe"
    )
    convert.add_argument(
        "script", type=Path, nargs="+", help="shell scripts, in order: alignment, then tuning"
    )
    convert.add_argument(
        "--out", type=Path, metavar="FILE", help="write there, not to the terminal"
    )
    convert.add_argument(
        "--devices", type=int, metavar="N", help="GPUs, where the launcher does not say it (8)"
    )
    convert.add_argument(
        "--define",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable that the script leaves open",
    )
    convert.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    import sys

    from llavakit import shown, write_text
    from llavakit_plugins.scaffolding.convert import convert
    from llavakit_plugins.scaffolding.scripts import read_script

    defined = {}
    for setting in arguments.define:
        name, equals, value = setting.partition("=")
        if not (equals and name.isidentifier()):
            raise RecipeError(f"--define {setting:.80}: write NAME=VALUE")
        defined[name] = value
    if arguments.devices is not None and arguments.devices < 1:
        raise RecipeError(f"--devices {arguments.devices}: give at least one")
    # before the scripts are read: nothing is replaced, and a wrong path is said at once
    if arguments.out is not None and arguments.out.exists():
        raise RecipeError(f"{arguments.out} is there already; name another file")
    commands = [command for path in arguments.script for command in read_script(path, defined)]
    converted = convert(commands, arguments.devices)
    names = " and ".join(path.name for path in arguments.script)
    text = converted.to_toml(f"Made of {names} by llava-run convert-recipe")
    if arguments.out is None:
        print(shown(text), end="")
        return 0
    write_text(arguments.out, text)
    # on the error stream, as the recipe itself may go to the other one;
    # in the text they are comments
    for remark in converted.remarks:
        print(shown(remark), file=sys.stderr)
    print(shown(f"wrote {arguments.out}; look at it with: llava-run {arguments.out} --plan"))
    return 0
