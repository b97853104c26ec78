"""Finds the file and the key that is wrong when a tokenizer cannot be read."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llavakit import ModelError
from llavakit_plugins.huggingface.json_files import Check, check, is_flag, is_text, read_json

Find = Callable[[str], Path | None]


class MissingLibrary(ModelError):
    """What reads a tokenizer is not here, or too old: nothing is wrong with its files."""


def blame_file(find: Find) -> None:
    """Raise ModelError where one of a tokenizer's files is seen to be damaged.

    `find` returns them by name, or None.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if path := find(name):
            table = read_json(path)
            check(table, path, _SETTINGS)
            for number, token in (table.get("added_tokens_decoder") or {}).items():
                if not _is_token(token):
                    raise ModelError(f"{path}: `added_tokens_decoder.{number}` is no token")
    for name in ("config.json", "added_tokens.json"):
        if path := find(name):
            read_json(path)
    if path := find("tokenizer.json"):
        from tokenizers import Tokenizer

        read_json(path)
        try:
            with without_panics():
                Tokenizer.from_file(str(path)).encode("a \u2603")
        except BaseException as error:  # tokenizers raises nothing narrower
            if not is_fault(error):
                raise
            reason = " ".join(str(error).split())
            raise ModelError(f"{path} is no tokenizer ({reason:.200}); copy it again") from error


def refuse_large_ids(path: Path | None) -> None:
    """Raise ModelError for a tokenizer.json with ids that no vocabulary has.

    The library makes a table as long as the largest id.
    """
    if path is None or not path.is_file() or not _LARGE.search(path.read_bytes()):
        return
    table = read_json(path)
    model = table.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = table.get("added_tokens")
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else ())]
    ids += [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    if any(isinstance(number, int) and number >= 10**_DIGITS for number in ids):
        raise ModelError(
            f"{path} gives a token the id {max(i for i in ids if isinstance(i, int))}, and no "
            "vocabulary is that large; copy it again"
        )


_DIGITS = 8
_LARGE = re.compile(rb"[:\s]\d{%d,}\s*[,}]" % (_DIGITS + 1))


def is_fault(error: BaseException) -> bool:
    """Return whether an exception comes from a damaged tokenizer.

    A panic in Rust is a BaseException and no Exception.
    """
    if isinstance(error, MissingLibrary):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def require_sentencepiece() -> None:
    """Raise MissingLibrary where a bare `tokenizer.model` cannot be read here.

    transformers reads it by messages that sentencepiece has for protobuf, which must not be older
    than those; where it cannot, it takes the file for tiktoken's.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except Exception as error:
        reason = " ".join(str(error).split())
        raise MissingLibrary(
            f"a bare tokenizer.model is read by sentencepiece and protobuf, which do not go "
            f"together here ({reason:.200}); pip install --upgrade protobuf, or install an older "
            "sentencepiece"
        ) from error


@contextmanager
def without_panics() -> Iterator[None]:
    """Keep what Rust writes of a panic in a tokenizer from the terminal: its error is said.

    Rust writes to the process's standard error itself, so this is turned to a file for a moment;
    what else was written to it comes behind.
    """
    with suppress(ValueError, OSError):  # it may be closed
        sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # there is none
        yield
        return
    panicked = False
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = not isinstance(error, Exception) and is_fault(error)
            raise
        finally:
            with suppress(ValueError, OSError):
                sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            aside.seek(0)
            if not panicked and (text := aside.read()):
                os.write(2, text)


def _is_token(value: Any) -> bool:
    if isinstance(value, str):
        return True
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return (
        isinstance(value, dict)
        and isinstance(value.get("content"), str)
        and all(isinstance(value.get(flag, False), bool) for flag in flags)
    )


def _are_tokens(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and all(map(_is_token, items))


_NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_SETTINGS: dict[str, tuple[Check, str]] = {
    **{f"{name}_token": (_is_token, "a token: text, or a table with `content`") for name in _NAMES},
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"), (_are_tokens, "a list of tokens")
    ),
    **dict.fromkeys(
        ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"), (is_flag, "true or false")
    ),
    **dict.fromkeys(("tokenizer_class", "padding_side", "truncation_side"), (is_text, "a name")),
    "model_max_length": (lambda value: isinstance(value, int | float), "a number"),
    "added_tokens_decoder": (lambda value: isinstance(value, dict), "a table of tokens"),
    "chat_template": (lambda value: isinstance(value, str | list | dict), "text"),
}
