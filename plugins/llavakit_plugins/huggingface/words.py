"""Tokenises word by word with a cache, for LLaMA's tokenizers: the same ids, several times faster.

In these tokenizers no token crosses into the next word or line: spaces stand only before words, and
a newline is a byte. So the ids of a word are always the same and can be cached, and so can those of
whole texts, such as a template's own and short answers, which come again and again.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llavakit import Ids, QuickReader, Reader, Segment, SpecialTokens

if TYPE_CHECKING:
    from tokenizers.models import BPE

T = TypeVar("T")
TokenizerT = TypeVar("TokenizerT")
Piece: TypeAlias = str | int
"""Text without special tokens, or the id of a special token."""

_SPACE = "▁"  # SentencePiece's space
_WORD = re.compile(r"\n| *[^ \n]+| +")
_LONGEST, _MOST = 32, 200_000  # words to remember: their characters, and how many
_LONGEST_RUN, _MOST_RUNS = 128, 1 << 16  # the same of texts: 25 MB
_YES, _NO = b"\1", b"\0"


def by_words(tokenizer: TokenizerT) -> TokenizerT:
    """Make a tokenizer read word by word where this is possible; return it."""
    tokenizer_: Any = tokenizer
    tokenizer_.quick_reader = words_of
    return tokenizer


def words_of(reader: Reader) -> QuickReader | None:
    """Return the reader by words, or None for a tokenizer that must see the whole text."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace

    backend = reader.backend
    model, spaces = backend.model, backend.pre_tokenizer
    added = backend.get_added_tokens_decoder().values()
    if (
        not isinstance(model, BPE)
        or not isinstance(spaces, Metaspace)
        or backend.normalizer is not None
        or (spaces.split, spaces.replacement) != (False, _SPACE)
        or (model.dropout, model.ignore_merges, model.byte_fallback) != (None, False, True)
        or any(t.lstrip or t.rstrip or t.single_word or not t.special for t in added)
    ):
        return None
    vocabulary = backend.get_vocab()
    reaches = re.compile(f"[^{_SPACE}]{_SPACE}|.\n|\n.", re.DOTALL)
    if any(map(reaches.search, vocabulary)):
        return None
    if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return None
    return Words(model, reader.special, reader.scheme).read


@dataclass
class Words:
    """Reads the text of a tokenizer in which no token reaches into the next word or line."""

    model: BPE
    special: SpecialTokens
    scheme: str  #: As the reader's.
    words: dict[str, array[int]] = field(default_factory=dict)  #: The ids of each,
    runs: dict[str, array[int]] = field(default_factory=dict)  #: and of texts that may come again.
    pieces: dict[str, list[Piece]] = field(default_factory=dict)  #: Of what a template writes.

    def read(self, parts: Sequence[Segment], into: Ids) -> bool:
        """Add ids and loss mask; or nothing, and return False, if supervision begins or ends
        within a word, or a text spells a special token out."""
        found: list[tuple[str | int, bool]] = []
        pieces, run, flag, space = self.pieces, "", False, self.scheme != "never"
        for text, supervised, markup in parts:
            for piece in (pieces.get(text) or self._pieces(text)) if markup else (text,):
                if isinstance(piece, str):
                    if run and piece and flag != supervised:
                        if not _apart(run, piece):
                            return False
                        found.append((f" {run}" if space else run, flag))
                        run, space = "", False
                    run, flag = run + piece, supervised if piece else flag
                    continue
                if run:
                    found.append((f" {run}" if space else run, flag))
                found.append((piece, supervised))
                run, space = "", self.scheme == "always"
        if run:
            found.append((f" {run}" if space else run, flag))
        ids, mask = array("i"), bytearray()
        for unit, flag in found:
            if isinstance(unit, str):
                known = self.runs.get(unit) or self._run(unit, parts)
                if known is None:
                    return False
                ids += known
                mask += (_YES if flag else _NO) * len(known)
            else:
                ids.append(unit)
                mask.append(flag)
        into.ids.extend(ids)
        into.supervised.extend(mask)
        return True

    def _pieces(self, text: str) -> list[Piece]:
        """Return markup as texts and the ids of the special tokens between them."""
        split = enumerate(self.special.pattern.split(text))
        found = [self.special.ids[piece] if number % 2 else piece for number, piece in split]
        _keep(self.pieces, text, found, _LONGEST_RUN, _MOST_RUNS)
        return found

    def _run(self, text: str, parts: Sequence[Segment]) -> array[int] | None:
        """Return the ids of a text between special tokens; None where it cannot be read here."""
        spells = self.special.pattern.search(text)
        if _SPACE in text or (spells and self.special.spelt_out(parts)):
            return None
        ids, words = array("i"), self.words
        for word in _WORD.findall(text):
            ids += words.get(word) or self._word(word)
        if not spells:  # whether it may be read is known then
            _keep(self.runs, text, ids, _LONGEST_RUN, _MOST_RUNS)
        return ids

    def _word(self, word: str) -> array[int]:
        known = array("i", [token.id for token in self.model.tokenize(word.replace(" ", _SPACE))])
        _keep(self.words, word, known, _LONGEST, _MOST)
        return known


def _keep(memory: dict[str, T], text: str, found: T, longest: int, most: int) -> None:
    if len(text) <= longest:
        if len(memory) >= most:
            memory.clear()
        memory[text] = found


def _apart(before: str, behind: str) -> bool:
    """Say whether a word or a line ends between two texts."""
    return "\n" in (before[-1], behind[0]) or (behind[0] == " " and before[-1] != " ")
