"""The tokenizer as llama.cpp has it: SentencePiece pieces with scores, or byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf
from gguf import TokenType

from llavakit import LanguageModel, ModelError
from llavakit_plugins.huggingface.tokenizer_writing import pieces_of

# what ByteLevel itself splits by
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLITS = {
    _GPT2: "gpt-2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
"""How text is split before merges, by the regular expression that llama.cpp has under a name."""


def write_vocabulary(
    writer: gguf.GGUFWriter, language: LanguageModel, rows: int, *, adds_bos: bool
) -> None:
    """Write tokens, their kinds, merges or scores, and the special ones.

    `rows` are those of the embedding. Raises ModelError for a tokenizer that llama.cpp has not.
    """
    tokenizer: Any = language.tokenizer
    table, pieces, split = _read(tokenizer)
    names = {number: text for text, number in tokenizer.get_vocab().items() if number < rows}
    added = tokenizer.added_tokens_decoder
    # llama.cpp wants a text for each row of the table,
    # also for rows that the tokenizer does not use
    tokens = [names.get(number, f"[PAD{number}]") for number in range(rows)]
    kinds = [TokenType.NORMAL if number in names else TokenType.UNUSED for number in range(rows)]
    if split is None:
        scores = _scores(pieces, table, tokens, kinds)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(True)
    else:
        scores = None
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        merges = table["model"]["merges"]
        # an empty list has no type in GGUF, and llama.cpp wants the key
        listed = [m if isinstance(m, str) else " ".join(m) for m in merges]
        writer.add_token_merges(listed or ["<none> <none>"])
    for number, token in added.items():
        if number < rows:
            tokens[number] = token.content
            kinds[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
            if scores is not None:
                scores[number] = -1000.0
    writer.add_token_list(tokens)
    if scores is not None:
        writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    _write_special(writer, language, adds_bos)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer that llama.cpp has not."""
    _read(tokenizer)


def _read(tokenizer: Any) -> tuple[dict[str, Any], bytes | None, str | None]:
    """Return a tokenizer's table, its SentencePiece model if it has one, and llama.cpp's name of
    how it splits text before merges, which SentencePiece does not."""
    table: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = pieces_of(tokenizer)
    if pieces is not None or _falls_back_to_bytes(table):
        return table, pieces, None
    if table["model"]["type"] != "BPE":
        raise ModelError(
            f"a tokenizer of the kind {table['model']['type']} is not written as GGUF, only "
            "SentencePiece's of LLaMA and byte-level BPE; `--format hf` keeps it"
        )
    return table, None, _split(table)


def _falls_back_to_bytes(table: Mapping[str, Any]) -> bool:
    return bool(table["model"].get("byte_fallback"))


def _scores(
    pieces: bytes | None, table: Mapping[str, Any], tokens: list[str], kinds: list[TokenType]
) -> list[float]:
    """Return the scores by which llama.cpp merges; sets the kinds of bytes and control pieces."""
    # of what no merge makes, such as single characters
    scores = [-10000.0] * len(tokens)
    if pieces is not None:
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_proto=pieces)
        for number in range(min(len(tokens), model.vocab_size())):
            tokens[number], scores[number] = model.IdToPiece(number), model.GetScore(number)
            if model.IsUnknown(number):
                kinds[number] = TokenType.UNKNOWN
            elif model.IsControl(number):
                kinds[number] = TokenType.CONTROL
            elif model.IsByte(number):
                kinds[number] = TokenType.BYTE
        return scores
    places = {text: number for number, text in enumerate(tokens)}
    for number, text in enumerate(tokens):
        if len(text) == 6 and text.startswith("<0x"):
            kinds[number], scores[number] = TokenType.BYTE, 0.0
    for rank, merge in enumerate(table["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        place = places.get(left + right)
        if place is not None and scores[place] == -10000.0:
            scores[place] = -float(rank)
    return scores


def _split(table: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how text is split before it is merged."""
    before = table.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    regexes = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    if not regexes and any(p.get("type") == "ByteLevel" for p in parts):
        own = any(p.get("use_regex", True) for p in parts if p["type"] == "ByteLevel")
        regexes = [_GPT2] if own or not table["model"]["merges"] else []
    name = _SPLITS.get(regexes[0] or "") if len(regexes) == 1 else None
    if name is None:
        raise ModelError(
            "llama.cpp has no name for the way in which this tokenizer splits text before it "
            "merges bytes; GGUF is written for those of GPT-2, Qwen2 and Llama 3"
        )
    return name


def _write_special(writer: gguf.GGUFWriter, language: LanguageModel, adds_bos: bool) -> None:
    tokenizer: Any = language.tokenizer
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            write = {
                "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id,
                "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id,
            }[name]  # fmt: skip
            write(number)
    ends = sorted(language.end_ids - {tokenizer.eos_token_id})
    if ends:  # of a turn: llama.cpp stops at it, too
        writer.add_eot_token_id(ends[0])
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(bool(adds_bos and begins and tokenizer.bos_token_id is not None))
    writer.add_add_eos_token(False)
