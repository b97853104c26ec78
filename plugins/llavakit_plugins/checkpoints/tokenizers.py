"""Reads a checkpoint's tokenizer as the one of its language model; config.json may name another."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llavakit import ModelError, write_text
from llavakit_plugins.huggingface.hub import load_tokenizer
from llavakit_plugins.huggingface.json_files import read_json, refuse_devices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
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
    table = read_json(path) if path.is_file() else {}
    if _is_bare(folder) and table.get("tokenizer_class") in _LLAMA:
        table = {"add_bos_token": True, **table, "tokenizer_class": "LlamaTokenizer"}
    return table


def _is_bare(folder: Path) -> bool:
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
