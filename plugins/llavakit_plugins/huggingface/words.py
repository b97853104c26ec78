"""Tokenises word by word with a cache, for LLaMA's tokenizers and those that cut words as GPT-2's:
the same ids, several times faster.

In LLaMA's no token crosses into the next word or line: spaces stand only before words, and a
newline is a byte. GPT-2's cuts a text into words by an expression and reads each by itself. So the
ids of a word are always the same and can be cached, and so can those of whole texts, such as a
template's own and short answers, which come again and again.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llavakit import Ids, QuickReader, Reader, Segment, SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

T = TypeVar("T")
TokenizerT = TypeVar("TokenizerT")
Piece: TypeAlias = str | bytes
"""Text without special tokens, or the id of a special token."""

_SPACE = "▁"  # SentencePiece's space
_WORD = re.compile(r" *[^ ]+| +")  # of a line
# GPT-2's expression for text in ASCII: of any other, `re` has no classes for it
_BYTE_WORD = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)
_BLANK = " \t\n\r\f\v"
_LONGEST, _MOST = 32, 200_000  # words to remember: their characters, and how many
_LONGEST_RUN, _MOST_RUNS = 128, 1 << 16  # the same of texts: 25 MB
_YES, _NO = b"\1", b"\0"
_WIDTH = array("i").itemsize  # bytes of an id


def by_words(tokenizer: TokenizerT) -> TokenizerT:
    """Make a tokenizer read word by word where this is possible; return it."""
    tokenizer_: Any = tokenizer
    tokenizer_.quick_reader = words_of
    return tokenizer


def words_of(reader: Reader) -> QuickReader | None:
    """Return the reader by words, or None for a tokenizer that must see the whole text."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Metaspace

    backend = reader.backend
    model, spaces = backend.model, backend.pre_tokenizer
    added = backend.get_added_tokens_decoder().values()
    if (
        not isinstance(model, BPE)
        or model.dropout is not None
        or backend.normalizer is not None
        or any(t.lstrip or t.rstrip or t.single_word or not t.special for t in added)
    ):
        return None
    if isinstance(spaces, ByteLevel):
        if spaces.add_prefix_space or not spaces.use_regex:
            return None
        return ByteWords(backend, reader.special).read
    if (
        not isinstance(spaces, Metaspace)
        or (spaces.split, spaces.replacement) != (False, _SPACE)
        or (model.ignore_merges, model.byte_fallback) != (False, True)
    ):
        return None
    vocabulary = backend.get_vocab()
    reaches = re.compile(f"[^{_SPACE}]{_SPACE}|.\n|\n.", re.DOTALL)
    if any(map(reaches.search, vocabulary)):
        return None
    if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return None
    return Words(model, reader.special, reader.scheme).read


class _Memory(dict[str, bytes]):
    """The ids of texts. What is not there is made, and kept where it is short."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, text: str) -> bytes:
        found = self._make(text)
        _keep(self, text, found, _LONGEST, _MOST)
        return found


class Words:
    """Reads the text of a tokenizer in which no token reaches into the next word or line.

    Ids are kept as the bytes of an array, which are joined faster than anything else.
    """

    def __init__(self, model: BPE, special: SpecialTokens, scheme: str) -> None:
        self._model, self._special, self._scheme = model, special, scheme
        self._words = _Memory(self._ids)
        self._spaced = _Memory(lambda word: self._ids(f" {word}"))  #: With a space in front.
        self._runs: dict[str, bytes] = {}  #: The ids of texts that may come again.
        self._pieces: dict[str, list[Piece]] = {}  #: Of what a template writes.

    def read(self, parts: Sequence[Segment], into: Ids) -> bool:
        """Add ids and loss mask; or nothing, and return False, if supervision begins or ends
        within a word, or a text spells a special token out."""
        found: list[tuple[Piece, bool]] = []
        pieces, run, flag, space = self._pieces, "", False, self._scheme != "never"
        for text, supervised, markup in parts:
            for piece in (pieces.get(text) or self._split(text)) if markup else (text,):
                if isinstance(piece, bytes):
                    if run:
                        found.append((f" {run}" if space else run, flag))
                    found.append((piece, supervised))
                    run, space = "", self._scheme == "always"
                elif piece and run:
                    if flag != supervised:
                        if not self._apart(run, piece):
                            return False
                        found.append((f" {run}" if space else run, flag))
                        run, space, flag = "", False, supervised
                    run += piece
                elif piece:
                    run, flag = piece, supervised
        if run:
            found.append((f" {run}" if space else run, flag))
        ids, mask, runs = [], [], self._runs
        for unit, flag in found:
            known = unit if isinstance(unit, bytes) else runs.get(unit) or self._run(unit, parts)
            if known is None:
                return False
            ids.append(known)
            mask.append((_YES if flag else _NO) * (len(known) // _WIDTH))
        into.ids.frombytes(b"".join(ids))
        into.supervised.extend(b"".join(mask))
        return True

    def _split(self, text: str) -> list[Piece]:
        """Return markup as texts and the ids of the special tokens between them."""
        split = enumerate(self._special.pattern.split(text))
        found: list[Piece] = [
            _stored([self._special.ids[piece]]) if number % 2 else piece for number, piece in split
        ]
        _keep(self._pieces, text, found, _LONGEST_RUN, _MOST_RUNS)
        return found

    def _run(self, text: str, parts: Sequence[Segment]) -> bytes | None:
        """Return the ids of a text between special tokens; None where it cannot be read here."""
        spells = self._special.pattern.search(text)
        if spells and self._special.spelt_out(parts):
            return None
        ids = self._run_ids(text)
        if ids is not None and not spells:  # whether it may be read is known then
            _keep(self._runs, text, ids, _LONGEST_RUN, _MOST_RUNS)
        return ids

    def _run_ids(self, text: str) -> bytes | None:
        if _SPACE in text:
            return None
        found: list[bytes] = []
        for number, line in enumerate(text.split("\n")):
            if number:
                found.append(self._words["\n"])
            if "  " in line:
                found.extend(map(self._words.__getitem__, _WORD.findall(line)))
                continue
            first, *others = line.split(" ")  # several times as fast as the expression
            if first:
                found.append(self._words[first])
            found.extend(map(self._spaced.__getitem__, others))
        return b"".join(found)

    def _ids(self, word: str) -> bytes:
        return _stored([token.id for token in self._model.tokenize(word.replace(" ", _SPACE))])

    def _apart(self, before: str, behind: str) -> bool:
        """Say whether a word or a line ends between two texts."""
        return "\n" in (before[-1], behind[0]) or (behind[0] == " " and before[-1] != " ")


class ByteWords(Words):
    """Reads text in ASCII of a byte-level tokenizer that cuts words by GPT-2's expression."""

    def __init__(self, backend: Tokenizer, special: SpecialTokens) -> None:
        super().__init__(backend.model, special, "never")
        self._cutter: Any = backend.pre_tokenizer

    def _run_ids(self, text: str) -> bytes | None:
        if not text.isascii():
            return None
        return b"".join(map(self._words.__getitem__, _BYTE_WORD.findall(text)))

    def _ids(self, word: str) -> bytes:
        pieces = (piece for piece, _ in self._cutter.pre_tokenize_str(word))  # bytes as letters
        return _stored([token.id for piece in pieces for token in self._model.tokenize(piece)])

    def _apart(self, before: str, behind: str) -> bool:
        # where a word begins with blanks depends on what stands behind them
        return behind[0] in _BLANK and before[-1] not in _BLANK


def _stored(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def _keep(memory: dict[str, T], text: str, found: T, longest: int, most: int) -> None:
    if len(text) <= longest:
        if len(memory) >= most:
            memory.clear()
        memory[text] = found
