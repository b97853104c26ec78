"""A data set that is rendered and tokenised once, stored compactly, and cut into micro-batches."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from llavakit import (
    DataError,
    Dataset,
    Encoded,
    LlavaError,
    LlavaModel,
    PackedBatch,
    PromptTemplate,
    Shown,
    VisionEncoder,
    and_more,
    encode,
    pack,
)
from llavakit_plugins.training.best_fit import best_fit
from llavakit_plugins.training.image_paths import ImagePaths

_NAMED = 5  # samples that an error lists


@dataclass(frozen=True)
class Batch:
    """The samples of one optimisation step, for each of its micro-batches."""

    samples: tuple[tuple[int, ...], ...]

    @property
    def all_samples(self) -> list[int]:
        return [sample for micro in self.samples for sample in micro]


class Corpus:
    """The ids, the loss mask and the images' paths of all samples, stored end to end.

    Each row of the data set is parsed once for all of it. A token takes two bytes and a bit (four
    bytes and a bit for large vocabularies). Samples are cut at `max_length` tokens, or at the
    language model's own limit if that is shorter.

    Raises DataError, before training starts, for a data set without samples, and for samples
    without a supervised token unless `unlearned` is "skip"; the error names the first of them.
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
        self.views, self.visual_tokens = model.views, model.visual_tokens
        if not len(data):
            raise DataError("the data set holds no samples; choose another")
        max_length = min(max_length, model.language.max_length)
        self.max_length = max_length
        tokenizer = model.language.tokenizer
        # negative numbers stand for images, so int16 holds vocabularies of less than 2^15 tokens
        ids = array("h" if len(tokenizer) < 1 << 15 else "i")
        supervised = array("B")
        counts = array("q")
        self.lengths = array("i")
        """Number of stream rows of each sample, visual rows included."""
        self.supervised_counts = array("i")
        """Number of supervised rows of each sample."""
        self.cut = 0
        """Number of samples longer than `max_length`."""
        self.images = ImagePaths(data)
        """The images of each sample."""
        self._sizes, self._first_size = array("i"), array("q", [0])
        self.mean_views = 1.0
        """Views of an image, on average over all uses of images."""
        views = 0
        for number in range(len(data)):
            sample = data[number]
            item = encode(sample, template, tokenizer, max_length)
            self.images.append(sample.images)
            shown = self.views.shown(sample.images, f"sample `{sample.id}`")
            self._sizes.extend(edge for image in shown for edge in image[:2])
            self._first_size.append(len(self._sizes) // 2)
            item = self.views.place(item, shown)
            views += sum(image.views for image in item.arranged or ())
            self.cut += item.length(self.visual_tokens, whole=True) > max_length
            ids.frombytes(item.ids.astype(ids.typecode).tobytes())
            # each sample's mask begins at a byte of its own, so that it is read without shifts
            supervised.frombytes(np.packbits(item.supervised).tobytes())
            counts.append(len(item.ids))
            self.lengths.append(item.length(self.visual_tokens))
            self.supervised_counts.append(item.supervised_count(self.visual_tokens))
            if number % 256 == 255 or number + 1 == len(data):
                progress(number + 1, len(data))
        if self._sizes:
            self.mean_views = 2 * views / len(self._sizes)
        self._ids = np.frombuffer(ids, dtype=ids.typecode)
        self._supervised_bits = np.frombuffer(supervised, dtype=np.uint8)
        of_samples = np.frombuffer(counts, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(of_samples)])
        self._bit_starts = np.concatenate([[0], np.cumsum(-(-of_samples // 8))])
        teaches = np.asarray(self.supervised_counts) > 0
        self.samples = np.flatnonzero(teaches).tolist()
        """Indices into `data` of the samples that are trained on."""
        self.skipped = np.flatnonzero(~teaches).tolist()
        """Indices into `data` of the samples without a supervised row."""
        if self.skipped and (unlearned == "refuse" or not self.samples):
            raise DataError(
                f"nothing is learned from {self.name_skipped()}: their answers are empty or lie "
                f"behind {self.max_length} tokens; remove them, raise max_length, or set "
                'unlearned = "skip"'
            )

    def name_skipped(self) -> str:
        """Return how many samples have no supervised row, and the ids of the first of them."""
        names = and_more(self.skipped, _NAMED, lambda number: f"`{self.data[number].id}`")
        return f"{len(self.skipped)} of {len(self.lengths)} samples ({names})"

    def __len__(self) -> int:
        return len(self.samples)

    def encoded(self, sample: int) -> Encoded:
        """Return the ids (int64) and the loss mask (bool) of one sample."""
        begin, end = self._starts[sample : sample + 2]
        bits = self._supervised_bits[self._bit_starts[sample] : self._bit_starts[sample + 1]]
        supervised = np.unpackbits(bits, count=int(end - begin)).astype(np.bool_)
        item = Encoded(self._ids[begin:end].astype(np.int64), supervised, self.max_length)
        return self.views.place(item, self.shown(sample))

    def shown(self, sample: int) -> list[Shown]:
        """Return the sizes of a sample's images; none where rows do not depend on them."""
        begin, end = self._first_size[sample : sample + 2]
        edges = iter(self._sizes[2 * begin : 2 * end])
        return [Shown(*size, end - begin) for size in zip(edges, edges, strict=True)]

    def pixels(self, vision: VisionEncoder, sample: int, number: int) -> Tensor:
        """Return what a vision encoder reads of an image's views. Raises LlavaError."""
        images = self.images[sample]
        image, count = images[number], len(images)
        try:
            return self.views.read(vision, image, "", count)
        except LlavaError:  # once more, with the sample's name: only now is its row parsed again
            where = f"sample `{self.data[sample].id}`"
            return self.views.read(vision, image, where, count)

    def pack(self, samples: Sequence[int]) -> PackedBatch:
        """Return the packed stream of these samples, on the CPU."""
        return pack([self.encoded(s) for s in samples], samples, self.visual_tokens)

    def batch(self, samples: Sequence[int], capacity: int) -> Batch:
        """Distribute the samples of a step over micro-batches of at most `capacity` rows.

        Packing is best-fit, within one step: the samples of a step stay those of the step.
        """
        bins = best_fit([self.lengths[s] for s in samples], capacity)
        return Batch(tuple(tuple(samples[index] for index in items) for items in bins))

    def epoch(self, seed: int, epoch: int, batch_size: int, capacity: int) -> Iterator[Batch]:
        """Yield the steps of one epoch; `seed` and `epoch` alone decide the order of samples.

        The order is computed anew from them, so a resume within an epoch needs no stored state.
        """
        shuffled = np.random.default_rng([seed, epoch]).permutation(len(self))
        order = np.asarray(self.samples)[shuffled].tolist()
        for begin in range(0, len(order), batch_size):
            yield self.batch(order[begin : begin + batch_size], capacity)

    def steps(self, batch_size: int) -> int:
        """Return the number of optimisation steps of one epoch; the last one may be smaller."""
        return -(-len(self) // batch_size)
