"""A data set, rendered and tokenised once, held compactly; and its cut into micro-batches."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llavakit import (
    DataError,
    Dataset,
    Encoded,
    LlavaModel,
    PackedBatch,
    PromptTemplate,
    and_more,
    encode,
    pack,
)
from llavakit_plugins.training.best_fit import best_fit

_NAMED = 5  # samples that an error lists


@dataclass(frozen=True)
class Batch:
    """One optimisation step: the samples of each micro-batch."""

    samples: tuple[tuple[int, ...], ...]

    @property
    def all_samples(self) -> list[int]:
        return [sample for micro in self.samples for sample in micro]


class Corpus:
    """Every sample's ids and learned mask, end to end: two bytes and a bit a token, as a rule.

    Samples are cut at `max_length`, or at the language model's own where that is less.
    Raises DataError naming samples in which nothing is learned, before training starts, unless
    `unlearned` says to skip them.
    """

    def __init__(
        self,
        data: Dataset,
        model: LlavaModel,
        template: PromptTemplate,
        max_length: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        unlearned: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        self.data = data
        self.visual_tokens = model.visual_tokens
        if not len(data):
            raise DataError("the data set holds no samples; choose another")
        max_length = min(max_length, model.language.max_length)
        self.max_length = max_length
        tokenizer = model.language.tokenizer
        # negative numbers stand for images, so half of the numbers are left for tokens
        ids = array("h" if len(tokenizer) < 1 << 15 else "i")
        supervised = array("B")
        counts = array("q")
        self.lengths = array("i")
        """Rows of the stream that each sample takes."""
        self.learned_counts = array("i")
        self.cut = 0
        """Samples longer than `max_length`."""
        for number in range(len(data)):
            item = encode(data[number], template, tokenizer, max_length)
            full = len(item.ids) + item.image_count * (self.visual_tokens - 1)
            self.cut += full > max_length
            ids.frombytes(item.ids.astype(ids.typecode).tobytes())
            supervised.frombytes(np.packbits(item.supervised).tobytes())
            counts.append(len(item.ids))
            self.lengths.append(item.length(self.visual_tokens))
            self.learned_counts.append(item.supervised_count(self.visual_tokens))
            if number % 256 == 255 or number + 1 == len(data):
                progress(number + 1, len(data))
        self._ids = np.frombuffer(ids, dtype=ids.typecode)
        self._learned_bits = np.frombuffer(supervised, dtype=np.uint8)
        of_samples = np.frombuffer(counts, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(of_samples)])
        self._bit_starts = np.concatenate([[0], np.cumsum(-(-of_samples // 8))])
        teaches = np.asarray(self.learned_counts) > 0
        self.samples = np.flatnonzero(teaches).tolist()
        """The samples to learn from, by their number in `data`."""
        self.skipped = np.flatnonzero(~teaches).tolist()
        """Those in which nothing is learned."""
        if self.skipped and (unlearned == "refuse" or not self.samples):
            raise DataError(
                f"nothing is learned from {self.name_skipped()}: their answers are empty or lie "
                f"behind {self.max_length} tokens; remove them, raise max_length, or set "
                'unlearned = "skip"'
            )

    def name_skipped(self) -> str:
        """Say how many samples teach nothing, and name the first."""
        names = and_more(self.skipped, _NAMED, lambda number: f"`{self.data[number].id}`")
        return f"{len(self.skipped)} of {len(self.lengths)} samples ({names})"

    def __len__(self) -> int:
        return len(self.samples)

    def encoded(self, sample: int) -> Encoded:
        """Return one sample's ids and mask."""
        begin, end = self._starts[sample : sample + 2]
        bits = self._learned_bits[self._bit_starts[sample] : self._bit_starts[sample + 1]]
        supervised = np.unpackbits(bits, count=int(end - begin)).astype(np.bool_)
        return Encoded(self._ids[begin:end].astype(np.int64), supervised, self.max_length)

    def pack(self, samples: Sequence[int]) -> PackedBatch:
        """Return the packed stream of these samples."""
        return pack([self.encoded(s) for s in samples], samples, self.visual_tokens)

    def batch(self, samples: Sequence[int], capacity: int) -> Batch:
        """Distribute the samples of a step over micro-batches of `capacity` rows."""
        bins = best_fit([self.lengths[s] for s in samples], capacity)
        return Batch(tuple(tuple(samples[index] for index in items) for items in bins))

    def epoch(self, seed: int, epoch: int, batch_size: int, capacity: int) -> Iterator[Batch]:
        """Yield the steps of one epoch, shuffled by `seed` and `epoch` alone."""
        places = np.random.default_rng([seed, epoch]).permutation(len(self))
        order = np.asarray(self.samples)[places].tolist()
        for begin in range(0, len(order), batch_size):
            yield self.batch(order[begin : begin + batch_size], capacity)

    def steps(self, batch_size: int) -> int:
        """Return the optimisation steps of one epoch."""
        return -(-len(self) // batch_size)
