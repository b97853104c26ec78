"""Loads a tokenizer from a folder, a file, or the hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit import is_model, write_text
from llavakit.contracts.errors import ModelError
from llavakit_plugins.huggingface.tokenizer_faults import (
    is_fault,
    refuse_large_ids,
    require_sentencepiece,
    without_panics,
)
from llavakit_plugins.huggingface.words import by_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def find_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer of a model folder, a Hugging Face folder, or a hub name.

    `source` may be a file, too: `tokenizer.json`, or SentencePiece's `tokenizer.model`, which is
    taken for LLaMA's. Raises ModelError where there is none.
    """
    path = Path(source)
    try:
        ours = is_model(path)
        for place in (path, path / "tokenizer.json", path / "language" / "tokenizer.json"):
            refuse_large_ids(place if place.name == "tokenizer.json" else None)
        with without_panics():
            if path.is_file():
                tokenizer = _from_file(path)
            else:
                tokenizer = fast_tokenizer(str(path / "language") if ours else source)
            tokenizer("a \u2603")  # some faults are seen when it is used
            return tokenizer
    except BaseException as error:  # tokenizers raises nothing narrower
        if not is_fault(error):
            raise
        reason = " ".join(str(error).split())
        raise ModelError(
            f"`{source}` gives no tokenizer ({reason:.200}); name a folder with tokenizer.json or "
            "tokenizer.model, such a file, or a model on the hub"
        ) from error


def fast_tokenizer(
    source: str, revision: str | None = None, **settings: Any
) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer of a Hugging Face folder or a hub name.

    `settings` change those that are written there.
    """
    from transformers import AutoTokenizer, PreTrainedConfig
    from transformers.utils.hub import cached_file

    revision = revision or "main"

    def held(name: str) -> str | None:
        found: str | None = cached_file(
            source,
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    def bare() -> str | None:
        return held("tokenizer.model") if held("tokenizer.json") is None else None

    if _is_of_ours(Path(source)):
        settings["config"] = PreTrainedConfig()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=revision, **settings
        )
    except Exception:
        if bare() is not None:
            require_sentencepiece()
        raise
    by_words(tokenizer)
    if (model := bare()) is not None:
        _merge_by_score(tokenizer, Path(model))
    return tokenizer


def _is_of_ours(folder: Path) -> bool:
    """Return whether a tokenizer is that of a model folder of ours, which is whole.

    Knowing the kind of the model, transformers 5 makes some tokenizers anew: a Qwen2 gets Qwen2's,
    whatever its folder says.
    """
    whole = (folder / "tokenizer.json").is_file()
    return whole and folder.name == "language" and is_model(folder.parent)


def _from_file(path: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    if path.suffix == ".json":
        if (path.parent / "tokenizer_config.json").is_file():
            return fast_tokenizer(str(path.parent))
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_file=str(path))
        return by_words(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").symlink_to(path.resolve())
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
        write_text(Path(folder) / "tokenizer_config.json", json.dumps(settings))
        return fast_tokenizer(folder)


def _merge_by_score(tokenizer: Any, model: Path) -> None:
    """Sort the merges of a tokenizer by the scores in its SentencePiece file.

    transformers 5.23 reads the merges of a bare `tokenizer.model` in the order of their ids, which
    for runs of spaces is not that of SentencePiece's scores.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    pieces = SentencePieceProcessor(model_file=str(model))
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    if table["model"].get("type") == "BPE":
        count = pieces.get_piece_size()
        scores = {pieces.id_to_piece(number): pieces.get_score(number) for number in range(count)}
        table["model"]["merges"].sort(key=lambda pair: -scores.get("".join(pair), 0.0))
        tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(table)).model
    if type(tokenizer).__name__.startswith("Llama") and tokenizer.add_prefix_space is not False:
        _check_kind(pieces.serialized_model_proto())


def _check_kind(model: bytes) -> None:
    """Raise ModelError for a file of another kind than LLaMA's, as which it was read.

    SentencePiece's own defaults are: unigrams, letters and spaces that are normalised.
    """
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto: Any = vars(messages)["ModelProto"]()
    proto.ParseFromString(model)
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    others = {
        "not BPE": trainer.model_type != trainer.BPE,
        "letters are normalised": bool(spec.precompiled_charsmap),
        "spaces are left out": spec.remove_extra_whitespaces,
        "no space in front": not spec.add_dummy_prefix,
    }
    if found := ", ".join(name for name, here in others.items() if here):
        raise ModelError(
            f"tokenizer.model is not of LLaMA's kind ({found}), as which it would be read; give "
            "its tokenizer.json"
        )
