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
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from threading import enumerate as threads
from traceback import format_exception
from typing import Any

from llavakit import __version__
from llavakit.contracts.commands import GROUP, Add
from llavakit.contracts.errors import LlavaError, PluginError

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
    installed = entry_points(group=GROUP)
    if arguments and arguments[0] not in _NEEDS_ALL:
        if arguments[0] not in installed.names:
            arguments.insert(0, "run")
        _find(arguments[0], installed)(commands)
    else:
        for name in sorted(installed.names, key=lambda name: (name != "run", name)):
            try:
                _find(name, installed)(commands)
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


def _find(name: str, installed: EntryPoints) -> Add:
    """Return what adds the command. Raises PluginError where it cannot be imported, or is two."""
    found = list(installed.select(name=name))
    if not found:  # the metadata of an installation may be older than its files
        raise PluginError(f"llavakit's command `{name}` is not installed; pip install it again")
    if len(found) > 1:
        packages = " and ".join(sorted(map(_package, found)))
        raise PluginError(f"{packages} both have a command `{name}`; uninstall one of them")
    try:
        add: Add = found[0].load()
    except Exception as error:
        raise PluginError(
            f"command `{name}` of {_package(found[0])} cannot be imported: {error}; fix it "
            f"(LLAVA_TRACEBACK=1 shows more), or uninstall it (pip uninstall {_package(found[0])})"
        ) from error
    return add


def _package(entry_point: EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else "an unknown package"


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
