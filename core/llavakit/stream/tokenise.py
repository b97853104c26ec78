"""Reads stretches of text with a fast tokenizer: ids, and which of them are learned.

What the tokenizer does not do by itself is done here: special tokens count only where the template
wrote them, and each id knows whether it is learned.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from llavakit.contracts.errors import DataError, ModelError
from llavakit.stream.tiling import IntArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from llavakit.contracts.interfaces import Segment

BoolArray = npt.NDArray[np.bool_]


class Ids(NamedTuple):
    """Ids one behind the other, in memory that grows without an object for each."""

    ids: array[int]  #: Of type "i".
    supervised: bytearray  #: A byte an id: 1 where it is learned, else 0.

    def add(self, ids: Iterable[int], supervised: bytes) -> None:
        self.ids.extend(ids)
        self.supervised.extend(supervised)

    def arrays(self) -> tuple[IntArray, BoolArray]:
        return np.array(self.ids, np.int64), np.array(self.supervised, np.bool_)


QuickReader = Callable[["Sequence[Segment]", Ids], bool]
"""Adds what `Reader.read` would, but faster; or nothing, and returns False: it cannot read that."""


@dataclass
class Reader:
    """What is known of one tokenizer."""

    backend: Tokenizer
    vocabulary: int
    special: SpecialTokens
    scheme: str
    """Where LLaMA's tokenizers put a space in front: at the `first` of a stretch, `always` behind
    special tokens too, or `never`. (transformers' option `legacy` chooses `always`.)"""
    quick: QuickReader | None = None  #: As the tokenizer's `quick_reader` gives it.

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Reader:
        """Return the tokenizer's reader: the same one as before, unless tokens were added.

        Raises ModelError for a tokenizer that cannot say which characters a token stands for.
        """
        backend = _backend(tokenizer)
        found = _readers.get(tokenizer)
        size = backend.get_vocab_size()
        if found is None or found.backend is not backend or found.vocabulary != size:
            found = cls(backend, size, SpecialTokens.of(backend), _scheme(backend))
            if make := getattr(tokenizer, "quick_reader", None):
                found.quick = make(found)
            _readers[tokenizer] = found  # a vocabulary takes a while to look through
        return found

    def beginning(self) -> list[int]:
        """Return the ids that the tokenizer puts in front of a text by itself."""
        if not self.backend.num_special_tokens_to_add(False):
            return []
        encoding = self.backend.encode("a")
        return list(encoding.ids[: encoding.special_tokens_mask.index(0)])

    def read(self, parts: Sequence[Segment], into: Ids) -> None:
        """Add the ids of one stretch of text, which has no images.

        A token that any learned character is part of is learned. Raises DataError for text that
        is no valid Unicode.
        """
        try:
            if self.quick and self.quick(parts, into):
                return
            if self.scheme != "never":
                parts = list(self._doubled(parts))
            if self.special.spelt_out(parts):
                _read([*map(self.special.stand_in, parts)], self.special.literal, into)
            else:
                _read(parts, self.backend, into)
        except (TypeError, UnicodeEncodeError) as error:  # half a surrogate pair, as JSON may hold
            raise DataError(f"the text is no valid Unicode ({error}); fix or remove it") from error

    def _doubled(self, parts: Sequence[Segment]) -> Iterator[Segment]:
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
                    if opens and text[0] in (" ", "▁"):
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


def _read(parts: Sequence[Segment], backend: Tokenizer, into: Ids) -> None:
    """Read with the tokenizer; the mask comes from the characters each token stands for."""
    encoding = backend.encode("".join(part.text for part in parts), add_special_tokens=False)
    ids = encoding.ids
    supervised = np.zeros(len(ids), dtype=np.bool_)
    if ids and any(part.supervised for part in parts):
        flat = chain.from_iterable(encoding.offsets)
        begins, ends = np.fromiter(flat, np.int64, 2 * len(ids)).reshape(-1, 2).T
        # GPT-2's and Llama 3's tokenizers leave spaces out of the offsets: the next token's
        begins = np.minimum(begins, np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]))
        ends = np.maximum(ends, begins + 1)
        position = 0
        for part in parts:
            start, position = position, position + len(part.text)
            if part.supervised and part.text:
                supervised |= (begins < position) & (ends > start)
    into.add(ids, supervised.tobytes())


@dataclass
class SpecialTokens:
    """A tokenizer's special tokens, and that tokenizer with other spellings for them.

    With those, whatever the text spells out is read as ordinary text, in its place, so that the
    tokens around it are what they would be around any other word.
    """

    ids: dict[str, int]
    pattern: re.Pattern[str]
    backend: Tokenizer

    @classmethod
    def of(cls, backend: Tokenizer) -> SpecialTokens:
        tokens = backend.get_added_tokens_decoder()
        ids = {token.content: number for number, token in tokens.items() if token.special}
        longest_first = sorted(filter(None, ids), key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        return cls(ids, pattern, backend)

    def spelt_out(self, parts: Sequence[Segment]) -> bool:
        """Say whether one stands where it is ordinary text."""
        return any(not part.markup and self.pattern.search(part.text) for part in parts)

    def stand_in(self, part: Segment) -> Segment:
        """Return a part of a template with the other spellings."""
        if not part.markup:
            return part
        return part._replace(text=self.pattern.sub(lambda m: self._spelling(m[0]), part.text))

    def _spelling(self, token: str) -> str:
        number = self.ids.get(token)
        return token if number is None else f"\ufdd0{number}\ufdd1"  # noncharacters: in no text

    @cached_property
    def literal(self) -> Tokenizer:
        """The tokenizer that knows the other spellings only."""
        data = json.loads(self.backend.to_str())
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
        return type(self.backend).from_str(json.dumps(data))
