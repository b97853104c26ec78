"""Errors a user can act on. Anything else that escapes is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from itertools import islice
from typing import Any


class LlavaError(Exception):
    """Base of every error that `llava-run` prints without a traceback (exit code 2)."""


class PluginError(LlavaError):
    """An installed plugin cannot be used."""


class RecipeError(LlavaError):
    """A recipe cannot be read, or names or configures something that does not exist."""


class DataError(LlavaError):
    """A data file, a sample or an image cannot be used."""


class ModelError(LlavaError):
    """A model folder cannot be read or written, or its parts do not fit."""


class TrainingError(LlavaError):
    """Training cannot go on."""


class ChatError(LlavaError):
    """A chat model cannot be used: no request would be answered."""


class ReplyError(ChatError):
    """A chat model did not answer one request; it may answer others."""

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting  #: Whether this request will never be answered, asked again or not.


def did_you_mean(
    name: str, known: Iterable[str], otherwise: str = "", spell: Callable[[str], object] = str
) -> str:
    """Return a hint: the known name close to `name`, as `spell` spells it, or else `otherwise`."""
    close = get_close_matches(name, known, n=1)  # one: a list of guesses helps nobody
    return f"did you mean `{spell(close[0])}`?" if close else otherwise


def and_more(items: Collection[Any], shown: int = 3, spell: Callable[[Any], object] = str) -> str:
    """Return the first items as `spell` spells them, for an error, and how many more there are."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    # sets and views of tables have no slices
    return ", ".join(str(spell(item)) for item in islice(items, shown)) + more
