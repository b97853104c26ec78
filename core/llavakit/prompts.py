"""From turns to token ids and the mask of learned tokens, built together in one pass.

Ids are those of the original LLaVA: the text is cut at `<image>`, each stretch is tokenised by
itself, and IMAGE_ID stands between. Where this differs from the original, it does so on purpose:

- The mask comes from the characters each token stands for. The original tokenises every turn a
  second time, compares lengths, and leaves a sample unlearned, with one printed line, where they
  differ: separators inside answers, a question at the end, an empty answer. No sample is left out
  here. One whose answers lie behind `max_length` has `learned_count` 0, for the caller to report.
- A special token spelt out in a turn, such as `</s>` in a question about HTML, is ordinary text:
  only what the template writes (`Segment.markup`) is special. `<image>` in an answer is text too.
- Of what a tokenizer puts around a text by itself only the beginning (BOS) is taken, never an end
  token: ends are the template's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from llavakit.errors import DataError, ModelError
from llavakit.samples import IMAGE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from llavakit.interfaces import PromptTemplate, Segment
    from llavakit.samples import Sample

IMAGE_ID = -200
"""Stands for one image among token ids, as in the original LLaVA."""

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Rows(NamedTuple):
    """One sample's rows of the stream."""

    token_ids: IntArray
    learned: BoolArray
    visual: BoolArray
    visual_count: int


@dataclass(frozen=True)
class Encoded:
    """One rendered sample: ids with IMAGE_ID for each image, and which ids are learned."""

    ids: IntArray
    learned: BoolArray
    max_length: int | None = None
    """Rows to keep after the images are spliced in; the original truncates there too."""

    @property
    def image_count(self) -> int:
        return int((self.ids == IMAGE_ID).sum())

    def length(self, visual_tokens: int) -> int:
        """Return the rows it takes when one image takes `visual_tokens` rows."""
        full = len(self.ids) + self.image_count * (visual_tokens - 1)
        return full if self.max_length is None else min(full, self.max_length)

    def learned_count(self, visual_tokens: int) -> int:
        """Return how many learned tokens are left after truncation."""
        return int(self.expand(visual_tokens).learned[1:].sum())

    def expand(self, visual_tokens: int) -> Rows:
        """Give each image its rows; truncate."""
        is_image = self.ids == IMAGE_ID
        repeats = np.where(is_image, visual_tokens, 1)
        visual = np.repeat(is_image, repeats)[: self.max_length]
        ids = np.repeat(np.where(is_image, 0, self.ids), repeats)[: self.max_length]
        learned = np.repeat(self.learned, repeats)[: self.max_length]
        return Rows(ids, learned, visual, int(visual.sum()))


def encode(
    sample: Sample,
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> Encoded:
    """Render a sample and tokenise it.

    Raises DataError, with the sample's id, where the template cannot render it, or loses or
    invents an image.
    """
    try:
        segments = template.segments(sample.turns, tokenizer)
        # `adds_bos = False` on a template: it writes the beginning of the text itself
        begin: bool = getattr(template, "adds_bos", True)
        ids, learned = tokenise(segments, tokenizer, begin=begin)
    except DataError as error:
        raise DataError(f"sample `{sample.id}`: {error}") from error
    encoded = Encoded(ids, learned, max_length)
    if encoded.image_count != len(sample.images):
        raise DataError(
            f"sample `{sample.id}` has {len(sample.images)} images, but the prompt template "
            f"`{template.name}` renders {encoded.image_count}"
        )
    return encoded


def tokenise(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, *, begin: bool = True
) -> tuple[IntArray, BoolArray]:
    """Return ids `[T]` and the mask `[T]` of learned ids.

    A token that any learned character is part of is learned. `begin` puts the tokenizer's own
    beginning (BOS) in front, where it has one. Raises ModelError for a tokenizer that cannot say
    which characters a token stands for, DataError for text that is no valid Unicode.
    """
    backend = _backend(tokenizer)
    stretches = list(_stretches(segments))
    special = _special_tokens(tokenizer, backend)
    if any(not part.markup and special.within(part.text) for part in chain(*stretches)):
        backend = special.literal(backend)
        stretches = [[special.stand_in(part) for part in parts] for parts in stretches]
    ids: list[int] = _beginning(_backend(tokenizer)) if begin else []
    masks = [np.zeros(len(ids), dtype=np.bool_)]
    for number, parts in enumerate(stretches):
        if number:
            ids.append(IMAGE_ID)
            masks.append(np.zeros(1, dtype=np.bool_))
        new, mask = _read(parts, backend)
        ids += new
        masks.append(mask)
    return np.asarray(ids, dtype=np.int64), np.concatenate(masks)


class _Part(NamedTuple):
    """A piece of a segment between two images."""

    text: str
    learned: bool
    markup: bool


def _stretches(segments: Sequence[Segment]) -> Iterator[list[_Part]]:
    """Yield the text between the images, in parts."""
    parts: list[_Part] = []
    for segment in segments:
        # an answer shows no images: the original would take a later sample's image for it
        pieces = [segment.text] if segment.learned else segment.text.split(IMAGE)
        for number, text in enumerate(pieces):
            if number:
                yield parts
                parts = []
            parts.append(_Part(text, segment.learned, segment.markup))
    yield parts


def _read(parts: Sequence[_Part], backend: Tokenizer) -> tuple[list[int], BoolArray]:
    """Return the ids of one stretch, and which of them are learned."""
    try:
        encoding = backend.encode("".join(part.text for part in parts), add_special_tokens=False)
    except (TypeError, UnicodeEncodeError) as error:  # half a surrogate pair, as JSON may hold
        raise DataError(f"the text is no valid Unicode ({error}); mend or remove it") from error
    ids: list[int] = encoding.ids
    learned = np.zeros(len(ids), dtype=np.bool_)
    if ids and any(part.learned for part in parts):
        flat = chain.from_iterable(encoding.offsets)
        begins, ends = np.fromiter(flat, np.int64, 2 * len(ids)).reshape(-1, 2).T
        # GPT-2's and Llama 3's tokenizers leave spaces out of the offsets: the next token's
        begins = np.minimum(begins[1:], np.maximum.accumulate(ends)[:-1])
        position = 0
        for part in parts:
            start, position = position, position + len(part.text)
            if part.learned:
                learned[0] |= start == 0 < position
                learned[1:] |= (begins < position) & (ends[1:] > start)
    return ids, learned


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


def _beginning(backend: Tokenizer) -> list[int]:
    """Return the ids a tokenizer puts in front of a text by itself."""
    if not backend.num_special_tokens_to_add(False):
        return []
    encoding = backend.encode("a")
    return list(encoding.ids[: encoding.special_tokens_mask.index(0)])


@dataclass
class _SpecialTokens:
    """A tokenizer's special tokens, and that tokenizer with other spellings for them.

    With those, whatever the text spells out is read as ordinary text, in its place, so that the
    tokens around it are what they would be around any other word.
    """

    vocabulary: int
    """Size of the vocabulary when this was made; tokens may be added later."""
    spellings: dict[str, str]
    pattern: re.Pattern[str]
    respelt: list[Tokenizer] = field(default_factory=list)

    @classmethod
    def of(cls, backend: Tokenizer) -> _SpecialTokens:
        tokens = backend.get_added_tokens_decoder()
        spellings = {  # U+FDD0 and U+FDD1 are noncharacters: no text has them
            token.content: f"\ufdd0{number}\ufdd1"
            for number, token in tokens.items()
            if token.special
        }
        longest_first = sorted(spellings, key=len, reverse=True)
        pattern = "|".join(re.escape(token) for token in longest_first) or r"(?!)"
        return cls(backend.get_vocab_size(), spellings, re.compile(pattern))

    def within(self, text: str) -> bool:
        return self.pattern.search(text) is not None

    def stand_in(self, part: _Part) -> _Part:
        """Return a part of a template with the other spellings."""
        if not part.markup:
            return part
        return part._replace(text=self.pattern.sub(lambda m: self.spellings[m[0]], part.text))

    def literal(self, backend: Tokenizer) -> Tokenizer:
        """Return the tokenizer that knows the other spellings only; made when first needed."""
        if not self.respelt:
            self.respelt.append(_respell(backend, self.spellings))
        return self.respelt[0]


def _respell(backend: Tokenizer, spellings: dict[str, str]) -> Tokenizer:
    from tokenizers import Tokenizer

    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        token["content"] = spellings.get(token["content"], token["content"])
    model = data["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {spellings.get(token, token): i for token, i in vocabulary.items()}
    else:  # Unigram: pairs of token and score
        model["vocab"] = [[spellings.get(token, token), score] for token, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = spellings.get(model["unk_token"], model["unk_token"])
    data["post_processor"] = None
    respelt: Tokenizer = Tokenizer.from_str(json.dumps(data))
    return respelt


_known: WeakKeyDictionary[PreTrainedTokenizerBase, _SpecialTokens] = WeakKeyDictionary()


def _special_tokens(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> _SpecialTokens:
    found = _known.get(tokenizer)
    if found is None or found.vocabulary != backend.get_vocab_size():
        found = _known[tokenizer] = _SpecialTokens.of(backend)
    return found
