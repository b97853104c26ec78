"""Reads the training commands of a shell script: their flags, and on how many devices they run.

The script is read, never run: assignments, `$NAME`, comments and lines that go on are understood;
what a shell would have to work out is asked for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llavakit import RecipeError

_LARGEST = 1_000_000  # characters
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?:(##?|%%?)([^}]*))?\}|(\w+))")


@dataclass(frozen=True)
class Command:
    """One training command."""

    where: str  #: File and line, for messages.
    flags: Mapping[str, str]  #: By name, without `--`; `True` where a flag has no value.
    devices: int | None  #: As the launcher says it; None where it takes all that there are.


def read_script(path: Path, defined: Mapping[str, str]) -> list[Command]:
    """Return the training commands of a script. `defined` are variables that it does not set.

    Raises RecipeError for a file that cannot be read, or has no such command.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text; give a shell script") from error
    if len(text) > _LARGEST:
        raise RecipeError(f"{path} is no training script: it is too long")
    variables = dict(defined)
    commands = []
    for number, line in _lines(text):
        where = f"{path}, line {number}"
        try:
            # split before variables are put in: a value with spaces then stays one word
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise RecipeError(f"{where}: {str(error).lower()}; fix the quotes") from error
        if len(words) == 1 and (found := re.fullmatch(r"(\w+)=(.*)", words[0], flags=re.S)):
            value = _maybe(found[2], variables)
            if found[1] not in defined or not _VARIABLE.search(value):  # `NAME=$1` is left open
                variables[found[1]] = value
        elif (program := _trains(words)) is not None:
            words = [_expanded(word, variables, where) for word in words]
            commands.append(Command(where, _flags(words[program + 1 :], where), _devices(words)))
    if not commands:
        raise RecipeError(
            f"{path} has no training command: none of its lines runs a program `...train*.py` with "
            "flags; give the script itself, not one that calls it"
        )
    return commands


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield each line with its number; those that go on behind a backslash as one."""
    held, begin = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        begin = begin if held else number
        if line.rstrip().endswith("\\") and not line.lstrip().startswith("#"):
            held += line.rstrip()[:-1] + " "
            continue
        yield begin, held + line
        held = ""
    if held:
        yield begin, held


def _trains(words: list[str]) -> int | None:
    """Return which word is the training program; None for any other command."""
    for number, word in enumerate(words):
        if re.search(r"(^|/)\w*train\w*\.py$", word) and "--" in " ".join(words[number:]):
            return number
    return None


def _maybe(value: str, variables: Mapping[str, str]) -> str:
    """Return a value with the variables that are known; `$1` and the like stay as they are."""
    return _VARIABLE.sub(lambda found: _look_up(found, variables) or found[0], value)


def _expanded(word: str, variables: Mapping[str, str], where: str) -> str:
    value = _maybe(word, variables)
    if left := _VARIABLE.search(value):
        name = left[1] or left[4]
        spelt = next((k for k, v in variables.items() if v == left[0]), name)
        raise RecipeError(
            f"{where}: ${name} has no value in the script; say it with --define {spelt}=VALUE"
        )
    if "$(" in value or "`" in value:
        raise RecipeError(f"{where}: `{value:.80}` is a command's output; write what it is")
    return value


def _look_up(found: re.Match[str], variables: Mapping[str, str]) -> str | None:
    """Return a variable's value: `$NAME`, `${NAME}`, and `${NAME#*/}`, what is behind the slash."""
    value = variables.get(found[1] or found[4])
    if value is None or not found[2]:
        return value
    pattern = re.escape(found[3]).replace(r"\*", ".*" if len(found[2]) == 2 else ".*?")
    if found[2].startswith("#"):
        return re.sub(f"^(?:{pattern})", "", value, count=1)
    return re.sub(f"(?:{pattern})$", "", value, count=1)


def _flags(words: list[str], where: str) -> dict[str, str]:
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if re.match(r"--[a-zA-Z]", word):
            name, _, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            flags[name] = value or "True"
        # what is behind them is another command, or where the output goes
        elif word in ("&", "|", ";", "&&", "2>&1", ">"):
            break
        elif not name:
            raise RecipeError(f"{where}: `{word:.80}` belongs to no flag; remove it")
        else:
            flags[name] = word if flags[name] == "True" else f"{flags[name]} {word}"
    return flags


def _devices(words: list[str]) -> int | None:
    """Return the number of processes that deepspeed, torchrun or accelerate starts."""
    line = " ".join(words)

    def number(*names: str) -> int | None:
        found = re.search(rf"--(?:{'|'.join(names)})[= ](\d+)", line)
        return int(found[1]) if found else None

    # deepspeed's `--include localhost:0,1,2,3` names the devices one by one
    if included := re.search(r"--include[= ]\S*?:([\d,]+)", line):
        return len(included[1].strip(",").split(","))
    each = number("nproc[_-]per[_-]node", "num_gpus", "num_processes")
    if each is not None:
        return each * (number("nnodes", "num_nodes") or 1)
    return 1 if re.match(r"(CUDA_VISIBLE_DEVICES=\d+ )?python[\d.]* ", line) else None
