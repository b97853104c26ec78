"""The text of an answer while it grows, token by token, and where it stops."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN = "\ufffd"  # what a decoder writes for bytes that are no character


def special_stops(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> frozenset[int]:
    """Return the special tokens among stop texts: they leave no text to be found by."""
    special: Any = tokenizer.added_tokens_decoder
    return frozenset(number for number, token in special.items() if token.content in stops)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str]) -> str:
    """Return the text of a whole answer: up to the first stop text, without space around it."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return _cut(text, stops).strip()


def _cut(text: str, stops: Sequence[str], start: int = 0) -> str:
    """Return the text up to the first stop text from `start` on, where there is one."""
    found = [index for stop in stops if (index := text.find(stop, max(0, start))) >= 0]
    return text[: min(found)] if found else text


class AnswerText:
    """Decodes an answer as it comes, each token once or a few times, not all of them each time.

    What it has put out never changes: a character of several tokens waits until it is whole, what
    may become a stop text until it has not, space at the end until something follows. All pieces
    together are what `decode` makes of all tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []  #: The last tokens that have text, and those behind them.
        self._settled = 0  #: How many characters of `_ids` are part of `_text`.
        self._text = ""
        self._given = 0  #: How many characters of `_text` were put out, or left out in front.
        self._searched = 0
        self.stopped = False  #: Whether a stop text was found.

    def add(self, token: int) -> str:
        """Take the next token; return the text that is certain now; none behind a stop text."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text, own = self._decode(self._ids), self._decode([token])
        # behind a token without text, such as a lone space, the next might lose its space
        if own and not text.endswith(_UNKNOWN) and not self._is_byte(token):
            self._text += text[self._settled :]
            self._ids, self._settled = [token], len(own)  # the next needs none but it in front
        return self._piece(ended=False)

    def finish(self) -> str:
        """Return what is left, once the last token was added."""
        if self.stopped:
            return ""
        self._text += self._decode(self._ids)[self._settled :]
        self._ids, self._settled = [], 0
        return self._piece(ended=True)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _is_byte(self, token: int) -> bool:
        """Say whether a token is one byte of LLaMA's: a run of them is decoded as a whole."""
        return _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))) is not None

    def _piece(self, *, ended: bool) -> str:
        reach = max(map(len, self._stops), default=0)  # one may have begun in the text before
        whole, self._text = self._text, _cut(self._text, self._stops, self._searched - reach)
        self._searched = end = len(self._text)
        self.stopped = end < len(whole)
        if not (ended or self.stopped):
            end -= max((_overlap(self._text, stop) for stop in self._stops), default=0)
        end = max(len(self._text[:end].rstrip()), self._given)
        if not self._text[: self._given].strip():
            self._given = end - len(self._text[:end].lstrip())
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return how long the longest end of `text` is that `stop` begins with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class Unfinished:
    """Which of several answers go on, as their tokens come."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Container[int],
        stops: Sequence[str],
        room: Sequence[int],
    ) -> None:
        """`ends` are the tokens that end an answer; `room` is how many each may have."""
        self.active = list(range(len(room)))  #: The answers that go on, by number.
        self._ends, self._room = ends, list(room)
        self._texts = [AnswerText(tokenizer, stops) for _ in room] if stops else None

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Add a token to each active answer; return the indices of those that go on."""
        going = []
        for position, (index, token) in enumerate(zip(self.active, tokens, strict=True)):
            self._room[index] -= 1  # the end token takes room, too
            ended = token in self._ends or not self._room[index]
            if self._texts is not None and not ended:
                self._texts[index].add(token)
                ended = self._texts[index].stopped
            if not ended:
                going.append(position)
        self.active = [self.active[position] for position in going]
        return going
