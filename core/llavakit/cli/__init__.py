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
from llavakit.contracts.commands import GROUP, Commands
from llavakit.contracts.errors import LlavaError, PluginError, RecipeError, and_more
from llavakit.recipe.redaction import brief, shown
from llavakit.registry.entry_points import entry_points, explained, only, package_of

_USAGE = """\
llava-run RECIPE [--out DIR] [--set a.b.c=value ...] [--plan] [--resume]
       llava-run COMMAND ...

RECIPE is a TOML file or the name of a built-in recipe (llava-run recipes lists them).
"""
_NEEDS_ALL = ("-h", "--help", "--version", "completion", "plugins")  # the other commands, too


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when done, 2 where the user can fix it, 130 after an interrupt.

    As the program itself (`argv` is None) it may end the process, with that code.
    """
    if argv is not None:
        return _main(argv)
    code = _main(None)
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
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # torchrun's leader has met it, too: it says so and ends the others
        if "LLAVA_TRACEBACK" in os.environ:
            sys.stderr.write(shown("".join(format_exception(error))))
        text = str(error).replace("\n", "\n" if isinstance(error, RecipeError) else r"\n")
        sys.stderr.write(f"error: {brief(shown(text))}\n")
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return 0
    except Exception as error:
        if argv is not None:
            raise
        sys.stderr.write(shown("".join(format_exception(error))))
        return 1


def _run(arguments: list[str], *, program: bool) -> int:
    parser: argparse.ArgumentParser = _Parser(
        prog="llava-run", usage=_USAGE, description="Make, try and convert LLaVA models by recipe."
    )
    parser.add_argument("--version", action="version", version=f"llava-run {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", prog=parser.prog)
    installed, broken = entry_points(group=GROUP).names, dict[str, PluginError]()
    if arguments and arguments[0] not in _NEEDS_ALL:
        if arguments[0] not in installed:
            arguments.insert(0, "run")
        _add(arguments[0], commands)
    else:
        for name in sorted(installed, key=lambda name: (name != "run", name)):
            try:
                _add(name, commands)
            except PluginError as error:  # listed with the reason: it stops no other
                broken[name] = error
                commands.add_parser(name, help=str(error).replace("%", "%%"))
    known = argparse.Namespace(program=program, parser=parser, broken=broken)
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


def _add(name: str, commands: Commands) -> None:
    """Add a command. Raises PluginError for a package's that does not work by itself."""
    add, package = only(GROUP, name), package_of(next(iter(entry_points(group=GROUP, name=name))))
    if package != "llavakit":  # ours are tested, and to try all of them takes a while
        with explained(f"plugin {package} cannot add its command `{name}`"):
            alone = _Parser(prog="llava-run")
            add(tried := alone.add_subparsers())
            taken = {*entry_points(group=GROUP).names, *commands.choices} & {*tried.choices}
            if taken != {name}:
                raise PluginError(
                    f"command `{name}` of {package} adds {and_more(tried.choices) or 'none'}; let "
                    "it add one of its own name, and no other command's, or uninstall it"
                )
            for parser in (alone, *tried.choices.values()):
                parser.format_help()  # raises where a text has a bare %
    add(commands)


class _Parser(argparse.ArgumentParser):
    """Shows no argument and no help raw; the parsers of commands are of this class, too."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(brief(shown(message)), file)


class _Shown(logging.Formatter):
    """Lets through what may be shown."""

    def format(self, record: logging.LogRecord) -> str:
        text, ours = shown(super().format(record)), record.name.startswith("llavakit")
        return text.replace("\n", r"\n") if ours and not record.exc_info else text
