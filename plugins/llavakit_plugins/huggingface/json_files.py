"""The only reader of JSON in model folders; code behind it need not check the types again.

Raises ModelError, which names the file, and the key if one is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llavakit import ModelError

_LARGEST = 1 << 29  # bytes; the largest tokenizers have a tenth of it


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON table. Raises ModelError where the file cannot be read or holds none."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ModelError(f"{path} is no regular file; put the model's own there")
        if path.stat().st_size > _LARGEST:
            raise ModelError(f"{path} has {path.stat().st_size:,} bytes; copy it again")
        # -sig: editors on Windows begin files with a mark
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); copy it again") from error
    # RecursionError: brackets in brackets without end
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} holds no table; copy it again")
    return table


def peek_json(path: Path) -> dict[str, Any]:
    """Return a JSON table, empty where there is none: enough to recognise a layout by."""
    try:
        return read_json(path)
    except ModelError:
        return {}


def refuse_devices(folder: Path) -> None:
    """Raise ModelError if one of a folder's files is a pipe or a device.

    Reading one could wait for ever, or fill the memory.
    """
    for path in sorted(folder.glob("*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelError(f"{path} is no regular file; put the model's own there, or remove it")


Check = Callable[[Any], bool]


def check(table: Mapping[str, Any], where: object, checks: Mapping[str, tuple[Check, str]]) -> None:
    """Raise ModelError for the first of these keys that has a wrong value.

    A key that is absent or null means its default.
    """
    for key, (fits, wanted) in checks.items():
        value = table.get(key)
        if value is not None and not fits(value):
            raise ModelError(f"{where}: `{key}` is {shown(value)}; it must be {wanted}")


def shown(value: Any) -> str:
    """Return a value as JSON, cut to what fits into a sentence."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


_SHOWN = 80


def is_count(value: Any) -> bool:
    """Say whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0  # True is an int


def are_counts(value: Any) -> bool:
    """Say whether a value is a whole number above 0, or a list of some."""
    return is_count(value) or (
        isinstance(value, list) and value != [] and all(map(is_count, value))
    )


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def check_shape(table: Mapping[str, Any], where: object) -> None:
    """Raise ModelError for a size of a network that is none."""
    check(table, where, _SHAPE)


_COUNT = (is_count, "a whole number above 0")
_COUNTS = (are_counts, "a whole number above 0, or a list of some")
_SHAPE: dict[str, tuple[Check, str]] = {
    "model_type": (is_text, "a name"),
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), _COUNT),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "vocab_size", "num_channels"), _COUNT),
    **dict.fromkeys(("intermediate_size", "image_size", "patch_size"), _COUNTS),
    "max_position_embeddings": _COUNT,
}


def end_tokens(path: Path) -> int | list[int] | None:
    """Return the tokens that end an answer by a generation_config.json, or None."""
    if not path.exists():
        return None
    ends: int | list[int] | None
    ends = read_json(path).get("eos_token_id")
    numbers = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise ModelError(f"{path}: `eos_token_id` is {shown(ends)}; it must be the ids of tokens")
    return ends if numbers else None
