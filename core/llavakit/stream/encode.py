"""From turns to token ids and the mask of learned tokens, built together in one pass.

Ids are those of the original LLaVA: the text is cut at `<image>`, each stretch is tokenised by
itself, and IMAGE_ID stands between. Where this differs from the original, it does so on purpose:

- The mask comes from the characters each token stands for. The original tokenises every turn a
  second time, compares lengths, and leaves a sample unlearned, with one printed line, where they
  differ: separators inside answers, a question at the end, an empty answer. No sample is left out
  here. Of one whose answers lie behind `max_length` nothing is learned; the caller reports it.
- A special token spelt out in a turn, such as `</s>` in a question about HTML, is ordinary text:
  only what the template writes (`Segment.markup`) is special. `<image>` in an answer is text too.
- Of what a tokenizer puts around a text by itself only the beginning (BOS) is taken, never an end
  token: ends are the template's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llavakit.contracts.data import IMAGE
from llavakit.contracts.errors import DataError
from llavakit.stream.tiling import Arrangement, IntArray
from llavakit.stream.tokenise import BoolArray, Ids, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavakit.contracts.data import Sample
    from llavakit.contracts.interfaces import PromptTemplate, Segment

IMAGE_ID = -200  #: Stands for one image among token ids, as in the original LLaVA.


class Rows(NamedTuple):
    """One sample's rows of the stream."""

    token_ids: IntArray
    supervised: BoolArray
    visual: BoolArray  #: Separator rows included.


@dataclass(frozen=True)
class Encoded:
    """One rendered sample: ids with IMAGE_ID for each image, and which ids are learned."""

    ids: IntArray
    supervised: BoolArray
    max_length: int | None = None  #: Rows to keep once images are spliced in, as the original does.
    arranged: tuple[Arrangement, ...] | None = None  #: Of each image; None: one view, in order.

    @property
    def image_count(self) -> int:
        return int((self.ids == IMAGE_ID).sum())

    def split(self, count: int) -> tuple[Encoded, Encoded]:
        """Return the first `count` ids, and the others."""
        images = int((self.ids[:count] == IMAGE_ID).sum())
        parts, shown = ((slice(at), slice(at, None)) for at in (count, images))
        front, rest = (
            replace(
                self, ids=self.ids[part], supervised=self.supervised[part],
                arranged=None if self.arranged is None else self.arranged[image],
            )
            for part, image in zip(parts, shown, strict=True)
        )  # fmt: skip
        return front, rest

    def images(self, visual_tokens: int) -> Sequence[Arrangement]:
        """Return the rows of each image; a view has `visual_tokens` embeddings."""
        if self.arranged is not None:
            return self.arranged
        return [Arrangement(1, np.arange(visual_tokens)[:, None])] * self.image_count

    def length(self, visual_tokens: int, *, whole: bool = False) -> int:
        """Return the rows it takes, or, if `whole`, would take without a `max_length`."""
        rows = sum(len(image.index_RK) for image in self.images(visual_tokens))
        full = len(self.ids) - self.image_count + rows
        return full if whole or self.max_length is None else min(full, self.max_length)

    def expand(self, visual_tokens: int) -> Rows:
        """Give each image its rows; truncate."""
        is_image = self.ids == IMAGE_ID
        repeats = np.ones(len(self.ids), np.int64)
        repeats[is_image] = [len(image.index_RK) for image in self.images(visual_tokens)]
        visual = np.repeat(is_image, repeats)[: self.max_length]
        ids = np.repeat(np.where(is_image, 0, self.ids), repeats)[: self.max_length]
        supervised = np.repeat(self.supervised, repeats)[: self.max_length]
        return Rows(ids, supervised, visual)


class Encoder:
    """Renders and tokenises samples, for a tokenizer that does not change in the meantime."""

    def __init__(self, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._reader = Reader.of(tokenizer)
        self._begin = self._reader.beginning() if template.adds_bos else []

    def read(self, sample: Sample, into: Ids) -> None:
        """Add a sample's ids, IMAGE_ID for each image. Raises DataError as `encode` does."""
        try:
            template = self._template
            if sample.system is not None:
                template = template.with_system(sample.system)
            segments = template.segments(sample.turns, self._tokenizer)
            images = _tokenise(segments, self._reader, self._begin, into)
        except DataError as error:
            raise DataError(f"sample `{sample.id}`: {error}") from error
        if images != len(sample.images):
            raise DataError(
                f"sample `{sample.id}` has {len(sample.images)} images, but the prompt template "
                f"`{template.name}` renders {images}; its `segments` must keep every `{IMAGE}`"
            )


def encode(
    sample: Sample,
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> Encoded:
    """Render a sample and tokenise it.

    Raises DataError, with the sample's id, where the template cannot render it, or its images.
    """
    into = Ids(array("i"), bytearray())
    Encoder(template, tokenizer).read(sample, into)
    return Encoded(*into.arrays(), max_length)


def tokenise(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, *, begin: bool = True
) -> tuple[IntArray, BoolArray]:
    """Return ids `[T]` and the mask `[T]` of learned ids.

    A token that any learned character is part of is learned. `begin` puts the tokenizer's own
    beginning (BOS) in front, where it has one. Raises ModelError for a tokenizer that cannot say
    which characters a token stands for, DataError for text that is no valid Unicode.
    """
    reader, into = Reader.of(tokenizer), Ids(array("i"), bytearray())
    _tokenise(segments, reader, reader.beginning() if begin else [], into)
    return into.arrays()


def _tokenise(segments: Sequence[Segment], reader: Reader, begin: Sequence[int], into: Ids) -> int:
    """Add ids and mask; return the number of images."""
    into.add(begin, bytes(len(begin)))
    images = 0
    parts: list[Segment] = []
    for segment in segments:
        # an answer shows no images: the original would take a later sample's image for it
        if segment.supervised or IMAGE not in segment.text:
            parts.append(segment)
            continue
        for number, text in enumerate(segment.text.split(IMAGE)):
            if number:
                reader.read(parts, into)
                into.add((IMAGE_ID,), b"\0")
                images, parts = images + 1, []
            parts.append(segment._replace(text=text))
    reader.read(parts, into)
    return images
