"""The `llava-run` command: finds the commands, `run` among them, and runs one.

They come from entry points of the group `llavakit.commands` (see `llavakit.contracts.commands`),
imported when they are used or listed. What a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import enumerate as threads
from traceback import format_exception
from typing import Any

from llavakit import __version__
from llavakit.contracts.commands import GROUP
from llavakit.contracts.errors import LlavaError, PluginError
from llavakit.registry.entry_points import entry_points, only

_USAGE = """\
llava-run RECIPE [--out DIR] [--set a.b.c=value ...] [--plan] [--resume]
       llava-run COMMAND ...

RECIPE is a TOML file or the name of a built-in recipe (llava-run recipes lists them).
"""
_NEEDS_ALL = ("-h", "--help", "--version", "completion")  # parsers of the other commands, too


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when done, 2 where the user can fix it, 130 after an interrupt.

    As the program itself (`argv` is None) it may end the process, with that code.
    """
    if argv is not None:
        return _main(argv)
    try:
        code = _main(None)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    # Sharded weights keep the process group's threads alive behind its end; while the interpreter
    # finalises they abort the process (pytorch issue 190489). The run closed what it had opened.
    # Nor is waited for a tracker that hangs, and for what its library does at exit.
    if "RANK" not in os.environ and not any(t.name.startswith("tracker ") for t in threads()):
        return code
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader went away
            stream.flush()
    os._exit(code)


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal has no letter for, is spelt out
        sys.stdout.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # prints warnings where nobody has set up logging
        logging.lastResort.setFormatter(_Shown())
    try:
        return _run(arguments, program=argv is None)
    except LlavaError as error:
        from llavakit.recipe.redaction import brief, shown  # not for --help

        _let_the_leader_speak()
        if "LLAVA_TRACEBACK" in os.environ:
            print(shown("".join(format_exception(error))), end="", file=sys.stderr)
        print(f"error: {brief(shown(str(error)))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return 0


def _run(arguments: list[str], *, program: bool) -> int:
    parser: argparse.ArgumentParser = _Parser(
        prog="llava-run",
        usage=_USAGE,
        description="Make, try and convert LLaVA models by recipe.",
    )
    parser.add_argument("--version", action="version", version=f"llava-run {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", prog=parser.prog)
    installed = entry_points(group=GROUP).names
    if arguments and arguments[0] not in _NEEDS_ALL:
        if arguments[0] not in installed:
            arguments.insert(0, "run")
        only(GROUP, arguments[0])(commands)
    else:
        for name in sorted(installed, key=lambda name: (name != "run", name)):
            try:
                only(GROUP, name)(commands)
            except PluginError as error:  # listed with the reason: it stops no other
                commands.add_parser(name, help=str(error).replace("%", "%%"))
    known = argparse.Namespace(program=program, parser=parser)
    parsed, rest = parser.parse_known_args(arguments, known)
    if not hasattr(parsed, "command"):
        parser.print_help()
        return 0
    if rest and not getattr(parsed, "reads_flags", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    parsed.flags = rest
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise LlavaError(f"no file can have the name {str(error.filename)[:300]!r}") from error


def _let_the_leader_speak() -> None:
    """Of several processes under torchrun most meet the same error; one that says it is enough.

    The leader ends with it, and torchrun ends the others then.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


class _Parser(argparse.ArgumentParser):
    """Shows no argument and no help raw; the parsers of commands are of this class, too."""

    def _print_message(self, message: str, file: Any = None) -> None:
        from llavakit.recipe.redaction import brief, shown

        super()._print_message(brief(shown(message)), file)


class _Shown(logging.Formatter):
    """Lets through what may be shown."""

    def format(self, record: logging.LogRecord) -> str:
        from llavakit.recipe.redaction import shown

        return shown(super().format(record))
