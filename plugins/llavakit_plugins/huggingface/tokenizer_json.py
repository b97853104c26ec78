"""What a tokenizer.json says of a text before it is merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

_INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}


def parts_of(
    table: Mapping[str, Any], key: Literal["normalizer", "pre_tokenizer"]
) -> list[dict[str, Any]]:
    """Return what is done, in order; a sequence in its parts. Each has a `type`."""
    found = table.get(key)
    parts = found.get(_INNER[key], [found]) if isinstance(found, dict) else []
    return [part for part in parts if isinstance(part, dict) and "type" in part]


def prepends(table: Mapping[str, Any]) -> bool:
    """Say whether a normalizer puts a space in front, as LLaMA's did before Metaspace came."""
    return any(part["type"] == "Prepend" for part in parts_of(table, "normalizer"))
