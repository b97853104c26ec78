"""Errors a user can act on. Anything else that escapes is a bug and keeps its traceback."""

from __future__ import annotations


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
        self.lasting = lasting
        """Whether this request will never be answered, however often it is asked."""
