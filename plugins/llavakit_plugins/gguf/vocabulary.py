"""The tokenizer as llama.cpp has it: SentencePiece pieces with scores, or byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
from gguf import TokenType

from llavakit import LanguageModel, ModelError, Reader
from llavakit_plugins.huggingface.tokenizer_json import parts_of, prepends
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
_KNOWN_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>",
)  # fmt: skip
"""Tokens that llama.cpp takes for ends by their names."""


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
        writer.add_add_space_prefix(prepends(table) or Reader.of(tokenizer).scheme != "never")
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
        _check_pieces(table)
        return table, pieces, None
    if table["model"]["type"] != "BPE":
        raise ModelError(
            f"a tokenizer of the kind {table['model']['type']} is not written as GGUF, only "
            "SentencePiece's of LLaMA and byte-level BPE; `--format hf` keeps it"
        )
    return table, None, _split(table)


def _falls_back_to_bytes(table: Mapping[str, Any]) -> bool:
    return bool(table["model"].get("byte_fallback"))


def _check_pieces(table: Mapping[str, Any]) -> None:
    """Raise ModelError where a text is changed before SentencePiece's merges as in no LLaMA."""
    spaces = {"pattern": {"String": " "}, "content": "▁"}
    normalizers = parts_of(table, "normalizer")
    others = [
        part["type"]
        for part in normalizers
        if part["type"] != "Prepend"
        and not (part["type"] == "Replace" and part.items() >= spaces.items())
    ]
    for part in parts_of(table, "pre_tokenizer"):
        # a text whose spaces are all replaced has none to split at
        splits = part["type"] == "Split" and part["pattern"] == {"String": " "} and normalizers
        if part["type"] != "Metaspace" and not splits:
            others.append(part["type"])
    if others:
        raise ModelError(
            f"llama.cpp does nothing like {', '.join(others)} of this tokenizer to a text before "
            "it merges SentencePiece's pieces; `--format hf` keeps it"
        )


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
    changed = [part["type"] for part in parts_of(table, "normalizer")]
    if set(changed) - {"NFC"}:  # which Qwen2 has, and llama.cpp leaves out
        raise ModelError(
            f"llama.cpp does nothing like {', '.join(changed)} of this tokenizer to a text before "
            "it merges bytes; `--format hf` keeps it"
        )
    parts = parts_of(table, "pre_tokenizer")
    own = parts[-1].get("use_regex", True) if parts else False
    name = None
    match [part["type"] for part in parts]:
        case ["ByteLevel"] if own or not table["model"]["merges"]:
            name = _SPLITS[_GPT2]
        case ["Digits", "ByteLevel"] if own and parts[0]["individual_digits"]:
            name = "smollm"
        case ["Split", "ByteLevel"] if not own:
            name = _SPLITS.get(parts[0]["pattern"].get("Regex", ""))
    if name is None:
        raise ModelError(
            "llama.cpp has no name for the way in which this tokenizer splits text before it "
            "merges bytes; GGUF is written for those of GPT-2, SmolLM, Qwen2 and Llama 3"
        )
    if parts[-1].get("add_prefix_space", True):
        raise ModelError(
            "this tokenizer puts a space in front of a text before it merges bytes "
            "(`add_prefix_space`), and llama.cpp puts none; `--format hf` keeps it"
        )
    return name


def remarks(language: LanguageModel) -> Iterator[str]:
    """Yield what llama.cpp does otherwise than the tokenizer, though it takes it."""
    tokenizer: Any = language.tokenizer
    if Reader.of(tokenizer).scheme == "first":
        yield (
            "llama.cpp puts a space in front of texts behind special tokens, too, and this "
            "tokenizer (`legacy = false`) in front of the first alone: later turns of a "
            "conversation begin with other tokens there"
        )
    left = [name for name in map(tokenizer.convert_ids_to_tokens, _ends(language)[2:])
            if name not in _KNOWN_ENDS]  # fmt: skip
    if left:
        yield (
            f"GGUF has a place for three tokens that end an answer: at {', '.join(left)} "
            "llama.cpp writes on"
        )


def _ends(language: LanguageModel) -> list[int]:
    """Return what ends an answer besides the tokenizer's own end."""
    tokenizer: Any = language.tokenizer
    return sorted(language.end_ids - {tokenizer.eos_token_id})


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
    ends = _ends(language)
    places = (writer.add_eot_token_id, writer.add_eom_token_id)  # of a turn, of a message
    for write_end, number in zip(places, ends, strict=False):
        write_end(number)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(bool(adds_bos and begins and tokenizer.bos_token_id is not None))
    writer.add_add_eos_token(False)
