"""A data set, rendered and tokenised once, held compactly; and its cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llavakit import DataError, Dataset, LlavaModel, PromptTemplate
from llavakit.packing import PackedBatch, best_fit, pack
from llavakit.prompts import Encoded, encode

_NAMED = 5  # samples that an error lists


@dataclass(frozen=True)
class Batch:
    """One optimisation step: the samples of each micro-batch."""

    samples: tuple[tuple[int, ...], ...]

    @property
    def all_samples(self) -> list[int]:
        return [sample for micro in self.samples for sample in micro]


class Corpus:
    """Every sample's ids and learned mask, end to end.

    Samples are cut at `max_length`, or at the language model's own where that is less.
    Raises DataError naming samples in which nothing is learned, before training starts.
    """

    def __init__(
        self,
        data: Dataset,
        model: LlavaModel,
        template: PromptTemplate,
        max_length: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.data = data
        self.visual_tokens = model.visual_tokens
        if not len(data):
            raise DataError("the data set holds no samples; choose another")
        max_length = min(max_length, model.language.max_length)
        self.max_length = max_length
        tokenizer = model.language.tokenizer
        ids: list[npt.NDArray[np.int32]] = []
        learned: list[npt.NDArray[np.bool_]] = []
        self.lengths: list[int] = []
        self.learned_counts: list[int] = []
        self.cut = 0
        """Samples longer than `max_length`."""
        for number in range(len(data)):
            item = encode(data[number], template, tokenizer, max_length)
            full = len(item.ids) + item.image_count * (self.visual_tokens - 1)
            self.cut += full > max_length
            ids.append(item.ids.astype(np.int32))
            learned.append(item.learned)
            self.lengths.append(item.length(self.visual_tokens))
            self.learned_counts.append(item.learned_count(self.visual_tokens))
            if number % 256 == 255 or number + 1 == len(data):
                progress(number + 1, len(data))
        self._starts = np.cumsum([0, *map(len, ids)])
        self._ids = np.concatenate(ids)
        self._learned = np.concatenate(learned)
        self._refuse_unlearnable()

    def _refuse_unlearnable(self) -> None:
        empty = [number for number, count in enumerate(self.learned_counts) if count == 0]
        if empty:
            names = ", ".join(f"`{self.data[number].id}`" for number in empty[:_NAMED])
            more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
            raise DataError(
                f"nothing is learned from {len(empty)} of {len(self)} samples ({names}{more}): "
                f"their answers are empty or lie behind {self.max_length} tokens; remove them or "
                "raise max_length"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def encoded(self, sample: int) -> Encoded:
        """Return one sample's ids and mask."""
        own = slice(self._starts[sample], self._starts[sample + 1])
        return Encoded(self._ids[own].astype(np.int64), self._learned[own], self.max_length)

    def pack(self, samples: Sequence[int]) -> PackedBatch:
        """Return the packed stream of these samples."""
        return pack([self.encoded(s) for s in samples], samples, self.visual_tokens)

    def batch(self, samples: Sequence[int], capacity: int) -> Batch:
        """Distribute the samples of a step over micro-batches of `capacity` rows."""
        bins = best_fit([self.lengths[s] for s in samples], capacity)
        return Batch(tuple(tuple(samples[index] for index in items) for items in bins))

    def epoch(self, seed: int, epoch: int, batch_size: int, capacity: int) -> Iterator[Batch]:
        """Yield the steps of one epoch, shuffled by `seed` and `epoch` alone."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self)).tolist()
        for begin in range(0, len(order), batch_size):
            yield self.batch(order[begin : begin + batch_size], capacity)

    def steps(self, batch_size: int) -> int:
        """Return the optimisation steps of one epoch."""
        return -(-len(self) // batch_size)
