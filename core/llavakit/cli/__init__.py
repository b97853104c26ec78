"""The `llava-run` command: `main`, and one module for each command.

A module's `add` says how its command is called; what the command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Sequence

from llavakit.cli import (
    chat,
    check_data,
    compare,
    export,
    import_model,
    plugins,
    recipes,
    run,
    score,
)
from llavakit.errors import LlavaError

_USAGE = """\
llava-run RECIPE [--out DIR] [--set a.b.c=value ...] [--plan] [--resume]
       llava-run COMMAND ...

RECIPE is a TOML file or the name of a built-in recipe (llava-run recipes lists them).
"""
_COMMANDS = (run, recipes, plugins, chat, export, import_model, score, check_data, compare)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when done, 2 where the user can mend it, 130 after an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal has no letter for, is spelt out
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    commands = parser.get_default("commands")
    if arguments and arguments[0] not in {*commands, "-h", "--help", "--version"}:
        arguments.insert(0, "run")
    flags: list[str] = []
    if arguments[:1] == ["score"]:  # its flags are known once the benchmarks are
        arguments, flags = arguments[:1], arguments[1:]
    known = argparse.Namespace(flags=flags, program=argv is None)
    parsed = parser.parse_args(arguments, known)
    if not hasattr(parsed, "command"):
        parser.print_help()
        return 0
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except LlavaError as error:
        _let_the_leader_speak()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return 0


def _let_the_leader_speak() -> None:
    """Of several processes under torchrun most meet the same error; one that says it is enough.

    The leader ends with it, and torchrun ends the others then.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-run",
        usage=_USAGE,
        description="Make, try and convert LLaVA models by recipe.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in _COMMANDS:
        command.add(commands)
    parser.set_defaults(commands=frozenset(commands.choices))
    return parser


class _Version(argparse.Action):
    """Prints the installed version, looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"llava-run {version('llavakit')}")
        parser.exit()
