"""System messages, examples and questions: text files of this package, or of a recipe's folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from llavakit import DataError, Message
from llavakit.contracts.data import RESPONSE_KINDS, ResponseKind

_PACKAGED = files("llavakit_plugins.generators").joinpath("prompts")


@dataclass(frozen=True)
class Prompt:
    """The texts before every context of a kind."""

    system: str
    examples: tuple[tuple[str, str], ...]
    """Pairs of a context and its reply, in the order of their files' names."""
    questions: tuple[str, ...]
    """Questions to draw from, for kinds whose reply is the answer alone."""

    def seeing(self) -> Prompt:
        """Return the prompt for a chat model that is shown the image."""
        return replace(self, system=f"{self.system}\n\n{_read(_PACKAGED / 'seen.txt')}")

    def messages(self, context: str) -> tuple[Message, ...]:
        """Return the request for a context, as the paper's table 13 orders it."""
        shown = [
            Message(role, text)  # type: ignore[arg-type]
            for pair in self.examples
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return (Message("system", self.system), *shown, Message("user", context))


def load_prompt(kind: ResponseKind, folder: Path | None) -> Prompt:
    """Return the prompt of a kind: the folder's where it has one, else the packaged one.

    A prompt is a folder of the kind's name with `system.txt`, pairs of `NAME_context.txt` and
    `NAME_reply.txt`, and `questions.txt` for `detail`. Raises DataError where something is missing.
    """
    source: Traversable = _PACKAGED / kind
    if folder is not None:
        _refuse_others(folder)
        if (folder / kind).is_dir():
            source = folder / kind
    # by name, because the order of a folder differs between file systems,
    # and would change the prompt
    contexts = sorted(
        item.name.removesuffix("_context.txt")
        for item in source.iterdir()
        if item.name.endswith("_context.txt")
    )
    examples = tuple(
        (_read(source / f"{name}_context.txt"), _read(source / f"{name}_reply.txt"))
        for name in contexts
    )
    questions: tuple[str, ...] = ()
    if kind == "detail":
        own = source / "questions.txt"
        # a folder that brings another system text may leave the questions to the packaged list
        lines = _read(own if own.is_file() else _PACKAGED / kind / "questions.txt").splitlines()
        questions = tuple(line.strip() for line in lines if line.strip())
    return Prompt(_read(source / "system.txt"), examples, questions)


def _refuse_others(folder: Path) -> None:
    """Raise DataError for a folder from which nothing would be taken, or not all of it."""
    if not folder.is_dir():
        raise DataError(f"the folder of prompts {folder} does not exist")
    found = sorted(item.name for item in folder.iterdir() if item.is_dir())
    others = [name for name in found if name not in RESPONSE_KINDS and not name.startswith(".")]
    if others or not found:
        what = f"{folder / others[0]} is no kind of response" if others else f"{folder} is empty"
        raise DataError(f"{what}; a folder of prompts has {', '.join(RESPONSE_KINDS)}, or some")


def _read(file: Traversable) -> str:
    try:
        # `utf-8-sig` also drops the mark that some editors write at the start of a file
        text = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(
            f"cannot read the prompt {file}: {reason}; a kind has system.txt, and for each "
            "NAME_context.txt a NAME_reply.txt"
        ) from error
    if not text:
        raise DataError(f"the prompt {file} is empty; write something or remove its folder")
    return text
