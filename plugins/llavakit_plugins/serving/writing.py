"""The answers that are being written: their next tokens, their text, and where they end.

S answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from llavakit import AnswerText, Token, Written, choose_tokens, special_stops
from llavakit.contracts.model import Sampling

Finish = Literal["stop", "length"]
_SPACE = "\u2581"  # how SentencePiece writes one
_KNOWN = 1 << 16  # texts of tokens that are kept: most tokens come again


@dataclass(frozen=True)
class Piece:
    """What one token added to an answer."""

    text: str  #: Often empty: half a character, or what may become a stop text.
    token: Token
    finish: Finish | None = None


@dataclass(eq=False)
class Choice:
    """One of the answers to a request."""

    index: int
    written: Written
    text: AnswerText
    ends: frozenset[int]
    room: int  #: The tokens that it may have.

    @property
    def last(self) -> int:
        """Return the token that was chosen last."""
        return self.written.ids[-1]


class Voice:
    """Turns logits into tokens and text, for the answers of many requests at once."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._texts = _Texts(tokenizer)

    def begin(self, prompt: Sequence[int], sampling: Sampling, index: int, room: int) -> Choice:
        """Return an answer that has no token yet; `sampling.stop` are all the texts that end it."""
        return Choice(
            index,
            Written(sampling, prompt, index),
            AnswerText(self._texts, sampling.stop),  # type: ignore[arg-type]
            self._ends | special_stops(self._tokenizer, sampling.stop),
            room,
        )

    def speak(self, logits_SV: Any, choices: Sequence[Choice]) -> list[Piece]:
        """Give each answer its next token, from `[S, V]`, or from `[1, V]` for the first of all."""
        if logits_SV.shape[0] < len(choices):
            logits_SV = logits_SV[[0] * len(choices)]
        tokens = choose_tokens(logits_SV, [choice.written for choice in choices])
        return [_take(choice, token) for choice, token in zip(choices, tokens, strict=True)]

    def spell(self, token: int) -> str:
        """Return the text of one token by itself, the space in front included."""
        # None: rows of embeddings beyond the tokenizer's words, as padded ones have
        raw = self._texts.convert_ids_to_tokens(token) or ""
        return raw.replace(_SPACE, " ") if _SPACE in raw else self._texts.decode([token]) or raw


def _take(choice: Choice, token: Token) -> Piece:
    choice.written.ids.append(token.id)
    text = choice.text.add(token.id)
    # an end at the last token that there is room for is a stop, as with OpenAI
    if token.id in choice.ends or choice.text.stopped:
        finish: Finish | None = "stop"
    else:
        finish = "length" if len(choice.written.ids) >= choice.room else None
    if finish is not None:
        text += choice.text.finish()
    return Piece(text, token, finish)


class _Texts:
    """The methods of a tokenizer that an answer's text needs, with what they gave kept.

    transformers takes 30 microseconds for a token's text; with 16 answers that is as long as a
    step of a small model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decode = lru_cache(_KNOWN)(self._read)
        self.convert_ids_to_tokens = lru_cache(_KNOWN)(tokenizer.convert_ids_to_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        # longer runs, of bytes or of tokens without text, rarely come again
        return self._decode(tuple(ids)) if len(ids) <= 2 else self._read(ids)

    def _read(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
