"""Writes a tokenizer's files so that the widest range of readers understands them.

transformers 5 names classes and settings that version 4 refuses, and leaves out tokenizer.model,
which the original LLaVA and llama.cpp read. So what a tokenizer was read from is kept with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llavakit import Reader
from llavakit_plugins.huggingface.tokenizer_json import prepends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECES, VOCABULARY, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_ORIGIN = "llavakit_origin"  # an attribute, so that copies of the tokenizer have it too
_NEW = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend")
"""The classes that version 5 gives a tokenizer without one of its own."""
_WHOLE = "PreTrainedTokenizerFast"  # what every version since 3 calls a tokenizer.json alone
_ENVIRONMENT = ("backend", "is_local", "local_files_only", "name_or_path")
"""Settings that say how it was read, and not what it is."""
_KEPT = ("legacy", "sp_model_kwargs", "spaces_between_special_tokens")
"""Settings of a SentencePiece tokenizer that version 5 forgets."""


class Origin(NamedTuple):
    """The files that a tokenizer was read from."""

    settings: dict[str, Any]
    vocabulary: bytes | None
    pieces: bytes | None
    state: str
    """Of the tokenizer as it was read."""


def remember_origin(tokenizer: PreTrainedTokenizerBase, find: Callable[[str], Path | None]) -> None:
    """Keep with a tokenizer the files it was just read from; `find` returns them by name."""
    read = {
        name: path.read_bytes() for name in (PIECES, VOCABULARY, SETTINGS) if (path := find(name))
    }
    try:
        settings = json.loads(read.get(SETTINGS, b"{}"))
    except ValueError:
        settings = {}
    origin = Origin(
        settings if isinstance(settings, dict) else {},
        read.get(VOCABULARY),
        read.get(PIECES),
        _state(tokenizer),
    )
    setattr(tokenizer, _ORIGIN, origin)


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """Return the SentencePiece model that a tokenizer was read from, if it was read from one."""
    origin: Origin | None = getattr(tokenizer, _ORIGIN, None)
    return origin.pieces if origin is not None else None


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, *, as_imported: bool = True
) -> None:
    """Write a tokenizer's files into `folder`; with `as_imported` by the class it had there."""
    tokenizer.save_pretrained(folder)
    complete_tokenizer(tokenizer, folder, as_imported=as_imported)


def complete_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, *, as_imported: bool
) -> None:
    """Turn what `save_pretrained` wrote into `folder` into what every version reads."""
    origin: Origin = getattr(tokenizer, _ORIGIN, None) or Origin({}, None, None, "")
    path = folder / SETTINGS
    table = json.loads(path.read_text(encoding="utf-8"))
    for key in _ENVIRONMENT:
        table.pop(key, None)
    extra = table.pop("extra_special_tokens", None)
    if isinstance(extra, dict):  # tokens by names of their own, which both versions take so
        table["extra_special_tokens"] = extra
    elif extra:
        table["additional_special_tokens"] = extra
    table["tokenizer_class"] = name = _class_name(table, origin, as_imported)
    table["added_tokens_decoder"] = {
        str(number): {key: getattr(token, key) for key in _TOKEN}
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    if "Llama" in name:
        table |= {key: origin.settings[key] for key in _KEPT if key in origin.settings} | table
        if (legacy := _is_legacy(tokenizer)) is not None:
            table["legacy"] = legacy  # the class goes by it, and not by the file
        ids = tokenizer("a")["input_ids"]
        table["add_bos_token"] = ids[:1] == [tokenizer.bos_token_id]
        table["add_eos_token"] = ids[-1:] == [tokenizer.eos_token_id]
    path.write_text(json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    if origin.pieces is not None:
        (folder / PIECES).write_bytes(origin.pieces)
    if (vocabulary := folder / VOCABULARY).is_file():
        if origin.vocabulary is not None and _state(tokenizer) == origin.state:
            vocabulary.write_bytes(origin.vocabulary)
        else:
            text = vocabulary.read_text(encoding="utf-8")
            vocabulary.write_text(_for_older_readers(text, name), encoding="utf-8")


_TOKEN = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def _class_name(table: dict[str, Any], origin: Origin, as_imported: bool) -> str:
    name = str(table.get("tokenizer_class"))
    imported = origin.settings.get("tokenizer_class")
    if name not in _NEW:
        return name
    known = isinstance(imported, str) and imported not in _NEW
    return str(imported) if known and as_imported else _WHOLE


def _is_legacy(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """Say whether texts behind special tokens get a space in front, too; None where none does."""
    reader = Reader.of(tokenizer)
    if prepends(json.loads(reader.backend.to_str())):
        return True
    return None if reader.scheme == "never" else reader.scheme == "always"


def _state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what tells a tokenizer from one that reads otherwise."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    table = json.loads(backend.to_str())
    table["padding"] = table["truncation"] = None  # of the last call
    return sha256(json.dumps(table).encode()).hexdigest()


def _for_older_readers(text: str, name: str) -> str:
    """Return a tokenizer.json as `tokenizers` before 0.20 reads it too; as it is where none can."""
    table = json.loads(text)
    model, spaces = table["model"], table.get("pre_tokenizer") or {}
    merges = model.get("merges")
    if merges and not any(" " in piece for pair in merges for piece in pair):
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    if spaces.get("type") == "Metaspace":
        always = spaces.get("prepend_scheme") == "always" and not spaces.get("split", True)
        if always and "Llama" in name and table.get("normalizer") is None:
            # reads a text that begins with a space as SentencePiece does, and Metaspace does not
            table["pre_tokenizer"], table["normalizer"] = None, _PREPENDING
        else:
            spaces["add_prefix_space"] = spaces.get("prepend_scheme") != "never"
    return json.dumps(table, ensure_ascii=False)


_PREPENDING = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
"""What older versions of transformers wrote for LLaMA's tokenizers."""
