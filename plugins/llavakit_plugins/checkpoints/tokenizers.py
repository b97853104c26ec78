"""Reads a checkpoint's tokenizer as the one of its language model; config.json may name another."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llavakit import ModelError, write_text
from llavakit_plugins.huggingface.hub import load_tokenizer
from llavakit_plugins.huggingface.json_files import read_json, refuse_devices
from llavakit_plugins.huggingface.tokenizer_json import parts_of, prepends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHOLE = "tokenizer.json"
_VOCABULARIES = (_WHOLE, "tokenizer.model", "vocab.json")
_OTHERS = ("special_tokens_map.json", "added_tokens.json", "merges.txt")
_SETTINGS = "tokenizer_config.json"
_LLAMA = (None, "LLaMATokenizer", "LlamaTokenizer")
_CHATS = ("chat_template.jinja", "chat_template.json")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def read_tokenizer(folder: Path, model_type: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a checkpoint's folder, for a language model of this type.

    If config.json says `llava`, or if tokenizer_config.json names no known class (as in the first
    releases), transformers 5.23 reads a bare tokenizer.model in another way than LLaMA's: "a"
    without the space before it. So transformers gets the files in a temporary folder with a right
    config.json.

    Raises ModelError if there is no tokenizer, or if it cannot be read.
    """
    if not has_tokenizer(folder):
        raise ModelError(f"{folder} holds no tokenizer ({', '.join(_VOCABULARIES)}); copy it there")
    refuse_devices(folder)
    with TemporaryDirectory() as temporary:
        for name in (*_VOCABULARIES, *_OTHERS, *_CHATS):
            if (folder / name).is_file():
                # links, because a tokenizer.json may have tens of megabytes
                (Path(temporary) / name).symlink_to((folder / name).resolve())
        # a tokenizer.json is whole: knowing the model, transformers would build it another way
        config = {"model_type": model_type} if _is_bare(folder) else {}
        tables = {"config.json": config, _SETTINGS: _settings(folder)}
        for name, table in tables.items():
            write_text(Path(temporary) / name, json.dumps(table))
        tokenizer = load_tokenizer(temporary, where=folder)
    # without it, error messages and saved files would name the temporary folder
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json; of a bare tokenizer.model with what 4.x took for granted."""
    path = folder / _SETTINGS
    table: dict[str, Any] = read_json(path) if path.is_file() else {}
    name = table.get("tokenizer_class")
    if _is_bare(folder) and name in _LLAMA:
        return {"add_bos_token": True, **table, "tokenizer_class": "LlamaTokenizer"}
    if (folder / _WHOLE).is_file() and name in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return table | _spacing(read_json(folder / _WHOLE), table)
    return table


def _spacing(whole: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """Return the settings by which transformers' class puts spaces in front as the file does.

    The class goes by them and not by the file; a processor of the folder goes by the file.
    """
    for part in parts_of(whole, "pre_tokenizer"):
        if part["type"] == "Metaspace":
            scheme = part.get("prepend_scheme", "always")
            return {"legacy": scheme == "always", "add_prefix_space": scheme != "never"}
    # files of before `legacy` came; where it is stated, it is what the original's tokenizer did
    return {"legacy": True} if prepends(whole) and stated.get("legacy") is None else {}


def _is_bare(folder: Path) -> bool:
    return (folder / "tokenizer.model").is_file() and not (folder / _WHOLE).is_file()
