"""A SentencePiece model as LLaMA's, trained here: BPE with bytes for what it has no piece for.

Special tokens and bytes have LLaMA's ids, a space is put in front of every text, and text is left
as it is. The pieces below are LLaMA's too, in its order: what tests say in them falls into the same
pieces here and there.
"""

from __future__ import annotations

import io
import string

from sentencepiece import SentencePieceTrainer

PIECES = (
    "▁a", "▁the", "▁to", "▁S", "▁A", "▁and", "▁an", "▁The", "▁by", "▁[", "ok", "ite", "▁so",
    "▁Q", "▁more", "ER", "▁pol", "▁user", "▁between", "SS", "##", "▁fine", "hi", "▁US", "▁ok",
    "▁Why", "▁Ass", "▁gives", "▁questions", "What", "▁answers", "▁Hi", "▁hi", "uman", "Ass",
    "▁helpful", "IST", "USER", "hello", "▁curious", "▁Human", "▁detailed", "▁chat", "ANT", "Hi",
    "▁assistant", "▁intelligence", "istant", "▁hello", "▁artificial", "INST",
)  # fmt: skip
CHARACTERS = string.ascii_letters + string.punctuation + "éß中文日本"


def train() -> bytes:
    """Return a model of some hundred pieces, the file's content."""
    lines: list[str] = []
    for place, piece in enumerate(reversed(PIECES)):
        # digits stand alone, so that what follows one is learnt without a space in front
        text = piece[1:] if piece[0] == "▁" else f"1{piece}"
        lines += [text] * (40 + 4 * place)
    for letter in string.ascii_letters:
        lines += [letter] * 12  # a word's beginning
    for character in CHARACTERS:
        lines += [f"1{character}"] * 8
    lines += [f"1{' ' * width}1" for width in range(2, 17) for _ in range(2)]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=560,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
