"""`llava-run completion`: a script that completes its commands and flags in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from llavakit.contracts.commands import Commands

_SHELLS = ("bash", "zsh", "tcsh")  # that shtab knows
_NAMES_A_FILE = ("recipe", "file")


def add(commands: Commands) -> None:
    completion = commands.add_parser(
        "completion", help="print a script that completes commands and flags in a shell"
    )
    completion.add_argument("shell", choices=_SHELLS)
    completion.set_defaults(command=_completion)


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    parser: argparse.ArgumentParser = arguments.parser
    # shtab asks for file names only where an action says so
    for action in _actions(parser):
        if action.type is Path or action.dest in _NAMES_A_FILE:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield every flag and argument of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
