"""Reads stretches of text with a fast tokenizer: ids, and which of them are learned.

Two things the tokenizer does not do by itself are done here: special tokens count only where the
template wrote them, and LLaMA's tokenizers are read word by word with a memory, which is several
times as fast and gives the same ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from llavakit.contracts.errors import DataError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerBase

BoolArray = npt.NDArray[np.bool_]


class Part(NamedTuple):
    """A piece of text without images."""

    text: str
    learned: bool
    markup: bool  #: Whether special tokens in it count as such.


@dataclass
class Reader:
    """What is known of one tokenizer."""

    backend: Tokenizer
    vocabulary: int
    special: SpecialTokens
    words: Words | None
    scheme: str
    """Where LLaMA's tokenizers put a space in front: at the `first` of a stretch, `always` behind
    special tokens too, or `never`. (transformers' option `legacy` chooses `always`.)"""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Reader:
        """Return the tokenizer's reader: the same one as before, unless tokens were added.

        Raises ModelError for a tokenizer that cannot say which characters a token stands for.
        """
        backend = _backend(tokenizer)
        found = _readers.get(tokenizer)
        size = backend.get_vocab_size()
        if found is None or found.backend is not backend or found.vocabulary != size:
            special = SpecialTokens.of(backend)
            found = cls(backend, size, special, Words.of(backend, special), _scheme(backend))
            _readers[tokenizer] = found
        return found

    def beginning(self) -> list[int]:
        """Return the ids that the tokenizer puts in front of a text by itself."""
        if not self.backend.num_special_tokens_to_add(False):
            return []
        encoding = self.backend.encode("a")
        return list(encoding.ids[: encoding.special_tokens_mask.index(0)])

    def read(self, parts: Sequence[Part]) -> tuple[list[int], BoolArray]:
        """Return the ids of one stretch, and which of them are learned.

        A token that any learned character is part of is learned. Raises DataError for text that
        is no valid Unicode.
        """
        try:
            if self.scheme != "never":
                parts = list(self._doubled(parts))
            if any(not part.markup and self.special.within(part.text) for part in parts):
                parts = [self.special.stand_in(part) for part in parts]
                return _read(parts, self.special.literal(self.backend))
            by_words = self.words.read(parts) if self.words else None
            return by_words or _read(parts, self.backend)
        except (TypeError, UnicodeEncodeError) as error:  # half a surrogate pair, as JSON may hold
            raise DataError(f"the text is no valid Unicode ({error}); mend or remove it") from error

    def _doubled(self, parts: Sequence[Part]) -> Iterator[Part]:
        """Yield the parts with one space more where a text that gets a space begins with one.

        SentencePiece puts its space in front of those texts too, and Metaspace does not.
        """
        opens = True  # the next character is the first of a text
        for part in parts:
            pieces = self.special.pattern.split(part.text) if part.markup else [part.text]
            for number, text in enumerate(pieces):
                if number % 2:
                    opens = self.scheme == "always"
                elif text:
                    if opens and text[0] in (" ", _SPACE):
                        pieces[number] = f" {text}"
                    opens = False
            yield part._replace(text="".join(pieces))


_readers: WeakKeyDictionary[PreTrainedTokenizerBase, Reader] = WeakKeyDictionary()


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the tokenizers object, without what an earlier call may have left set."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for; load "
            "the model's fast tokenizer (a folder with tokenizer.json)"
        )
    if backend.padding is not None:
        backend.no_padding()
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    return backend


def _scheme(backend: Tokenizer) -> str:
    """Return where a tokenizer of LLaMA's make, BPE over ▁ and bytes, puts a space in front."""
    state = backend.pre_tokenizer.__getstate__() if backend.pre_tokenizer else b"{}"
    table: dict[str, Any] = json.loads(state)
    spaces: dict[str, Any] = next(iter(table.get("pretokenizers", [table])), {})
    llamas = spaces.get("type") == "Metaspace" and getattr(backend.model, "byte_fallback", False)
    return str(spaces.get("prepend_scheme", "always")) if llamas else "never"


def _read(parts: Sequence[Part], backend: Tokenizer) -> tuple[list[int], BoolArray]:
    """Read with the tokenizer; the mask comes from the characters each token stands for."""
    encoding = backend.encode("".join(part.text for part in parts), add_special_tokens=False)
    ids: list[int] = encoding.ids
    learned = np.zeros(len(ids), dtype=np.bool_)
    if ids and any(part.learned for part in parts):
        flat = chain.from_iterable(encoding.offsets)
        begins, ends = np.fromiter(flat, np.int64, 2 * len(ids)).reshape(-1, 2).T
        # GPT-2's and Llama 3's tokenizers leave spaces out of the offsets: the next token's
        begins = np.minimum(begins, np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]))
        ends = np.maximum(ends, begins + 1)
        position = 0
        for part in parts:
            start, position = position, position + len(part.text)
            if part.learned and part.text:
                learned |= (begins < position) & (ends > start)
    return ids, learned


@dataclass
class SpecialTokens:
    """A tokenizer's special tokens, and that tokenizer with other spellings for them.

    With those, whatever the text spells out is read as ordinary text, in its place, so that the
    tokens around it are what they would be around any other word.
    """

    ids: dict[str, int]
    pattern: re.Pattern[str]
    _respelt: list[Tokenizer] = field(default_factory=list)

    @classmethod
    def of(cls, backend: Tokenizer) -> SpecialTokens:
        tokens = backend.get_added_tokens_decoder()
        ids = {token.content: number for number, token in tokens.items() if token.special}
        longest_first = sorted(filter(None, ids), key=len, reverse=True)
        return cls(ids, re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})"))

    def within(self, text: str) -> bool:
        return self.pattern.search(text) is not None

    def stand_in(self, part: Part) -> Part:
        """Return a part of a template with the other spellings."""
        if not part.markup:
            return part
        return part._replace(text=self.pattern.sub(lambda m: self._spelling(m[0]), part.text))

    def literal(self, backend: Tokenizer) -> Tokenizer:
        """Return the tokenizer that knows the other spellings only; made when first needed."""
        if not self._respelt:
            self._respelt.append(self._respell(backend))
        return self._respelt[0]

    def _spelling(self, token: str) -> str:
        number = self.ids.get(token)
        return token if number is None else f"\ufdd0{number}\ufdd1"  # noncharacters: in no text

    def _respell(self, backend: Tokenizer) -> Tokenizer:
        from tokenizers import Tokenizer

        data = json.loads(backend.to_str())
        for token in data["added_tokens"]:
            token["content"] = self._spelling(token["content"])
        model = data["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {self._spelling(token): i for token, i in vocabulary.items()}
        else:  # Unigram: pairs of token and score
            model["vocab"] = [[self._spelling(token), score] for token, score in vocabulary]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._spelling(model["unk_token"])
        data["post_processor"] = None
        respelt: Tokenizer = Tokenizer.from_str(json.dumps(data))
        return respelt


_SPACE = "▁"  # SentencePiece's space
_WORD = re.compile(r"\n| *[^ \n]+| +")
_LONGEST, _MOST = 32, 200_000  # words to remember: their characters, and how many


@dataclass
class Words:
    """Reads the text of a tokenizer in which no token reaches into the next word or line.

    So it is with LLaMA's: spaces stand in front of words only, and a newline is a byte.
    """

    model: BPE
    special: SpecialTokens
    scheme: str  #: As the reader's.
    memory: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, backend: Tokenizer, special: SpecialTokens) -> Words | None:
        """Return the reader by words, or None for a tokenizer that must see the whole text."""
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import Metaspace

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
        return cls(model, special, _scheme(backend))

    def read(self, parts: Sequence[Part]) -> tuple[list[int], BoolArray] | None:
        """Return ids and mask, or None where learning begins or ends within a word."""
        ids: list[int] = []
        flags: list[bool] = []
        counts: list[int] = []
        for number, (runs, end) in enumerate(self._between_special(parts)):
            if not all(map(_apart, pairwise(text for text, _ in runs))):
                return None
            for place, (text, learned) in enumerate(runs):
                if _SPACE in text:
                    return None
                spaced = self.scheme == "always" or (self.scheme == "first" and not number)
                before = len(ids)
                ids += self._ids(f" {text}" if spaced and not place and text[0] != " " else text)
                flags.append(learned)
                counts.append(len(ids) - before)
            if end is not None:
                ids.append(self.special.ids[end.text])
                flags.append(end.learned)
                counts.append(1)
        return ids, np.repeat(np.asarray(flags, dtype=np.bool_), counts)

    def _between_special(
        self, parts: Sequence[Part]
    ) -> Iterator[tuple[list[tuple[str, bool]], Part | None]]:
        """Yield the text up to each special token, in runs, and the special token."""
        runs: list[tuple[str, bool]] = []
        for part in parts:
            pieces = self.special.pattern.split(part.text) if part.markup else [part.text]
            for number, text in enumerate(pieces):
                if number % 2:
                    yield runs, part._replace(text=text)
                    runs = []
                elif text and runs and runs[-1][1] == part.learned:
                    runs[-1] = (runs[-1][0] + text, part.learned)
                elif text:
                    runs.append((text, part.learned))
        yield runs, None

    def _ids(self, text: str) -> Iterator[int]:
        words = _WORD.findall(text)
        memory = self.memory
        try:
            return chain.from_iterable([memory[word] for word in words])
        except KeyError:
            return chain.from_iterable([self._word(word) for word in words])

    def _word(self, word: str) -> tuple[int, ...]:
        known = self.memory.get(word)
        if known is None:
            known = tuple(t.id for t in self.model.tokenize(word.replace(" ", _SPACE)))
            if len(word) <= _LONGEST:
                if len(self.memory) >= _MOST:
                    self.memory.clear()
                self.memory[word] = known
        return known


def _apart(texts: tuple[str, str]) -> bool:
    """Say whether a word or a line ends between two texts."""
    before, behind = texts[0][-1], texts[1][0]
    return before == "\n" or behind == "\n" or (behind == " " and before != " ")
