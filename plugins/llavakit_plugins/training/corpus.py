"""A data set that is rendered and tokenised once, stored compactly, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    Video,
    VisionEncoder,
    and_more,
    pack,
)
from llavakit_plugins.datasets.columns import Column, Columns
from llavakit_plugins.training.best_fit import best_fit
from llavakit_plugins.training.image_paths import ImagePaths
from llavakit_plugins.training.records import read_record
from llavakit_plugins.training.rows import Reading, read_all

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
    language model's own limit if that is shorter. `columns` are what was read before of the same
    data; then `data` is only asked for images that are no paths. So many samples as `together`
    says, one behind the other in the data set, are in one micro-batch, or are left out.

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
        columns: Columns | None = None,
        together: int = 1,
    ) -> None:
        self.data, self.together = data, together
        self.views, self.visual_tokens = model.views, model.visual_tokens
        self.max_length = min(max_length, model.language.max_length)
        if columns is None:
            columns = read_all(reading(data, model, template, max_length), progress)
        self._columns = columns
        self._map()
        if self.skipped and (unlearned == "refuse" or not len(self.samples)):
            raise DataError(
                f"nothing is learned from {self.name_skipped()}: their answers are empty or lie "
                f"behind {self.max_length} tokens; remove them, raise max_length, or set "
                'unlearned = "skip"'
            )

    def _map(self) -> None:
        columns = self._columns
        self.lengths: Column = columns["lengths"]
        """`[N]` int32: number of stream rows of each sample, visual rows included."""
        self.supervised_counts: Column = columns["supervised"]
        """`[N]` int32: number of supervised rows of each sample."""
        self.cut: int = columns.facts["cut"]
        """Number of samples longer than `max_length`."""
        self.images = ImagePaths(columns, self.data)
        """The images of each sample."""
        self._sizes = columns["sizes"]
        self.mean_views = 1.0
        """Views of an image, on average over all uses of images."""
        if len(self._sizes):
            self.mean_views = columns.facts["views"] / len(self._sizes)
        self.skipped: list[int] = np.flatnonzero(self.supervised_counts == 0).tolist()
        """Indices into `data` of the samples without a supervised row."""
        self.samples: range | Column = range(len(self.lengths))
        """Indices into `data` of the samples that are trained on."""
        if self.skipped:
            teaches = (self.supervised_counts > 0).reshape(-1, self.together).all(axis=1)
            self.samples = np.flatnonzero(teaches.repeat(self.together)).astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        # a process that shares no memory with us maps the file, and asks no data set for paths
        kept = ("views", "visual_tokens", "max_length", "together", "_columns")
        data = None if self._columns.facts["paths"] else self.data
        return {**{name: vars(self)[name] for name in kept}, "data": data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()

    @property
    def file(self) -> Path:
        """The file of tokenised data that it maps, where it is of one."""
        assert self._columns.path is not None
        return self._columns.path

    def name(self, sample: int) -> str:
        """Return a sample's id."""
        ends = self._columns["id_ends"]
        begin = int(ends[sample - 1]) if sample else 0
        found = self._columns["ids"][begin : int(ends[sample])].tobytes()
        return found.decode("utf-8", "surrogatepass")

    def name_skipped(self) -> str:
        """Return how many samples have no supervised row, and the ids of the first of them."""
        names = and_more(self.skipped, _NAMED, lambda number: f"`{self.name(number)}`")
        return f"{len(self.skipped)} of {len(self.lengths)} samples ({names})"

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def tokens(self) -> int:
        """Rows of the stream of all samples together."""
        return int(self.lengths.sum(dtype=np.int64))

    def lengths_of(self, samples: Sequence[int]) -> list[int]:
        """Return the number of stream rows of each of these samples."""
        found: list[int] = self.lengths[np.asarray(samples, np.int64)].tolist()
        return found

    def supervised_of(self, samples: Sequence[int]) -> int:
        """Return the supervised rows of these samples together."""
        return int(self.supervised_counts[np.asarray(samples, np.int64)].sum(dtype=np.int64))

    def encoded(self, sample: int) -> Encoded:
        """Return the ids (int64) and the loss mask (bool) of one sample."""
        return self.views.place(
            read_record(self._columns, sample, self.max_length), self.shown(sample)
        )

    def shown(self, sample: int) -> list[Shown]:
        """Return what a sample's images show; nothing where its rows do not depend on that."""
        if not len(self._sizes):
            return []
        uses = self.images.uses(sample)
        sizes: list[list[int]] = self._sizes[uses.start : uses.stop].tolist()
        stills = sum(not frames for _, _, frames in sizes)
        return [Shown(width, height, stills, frames) for width, height, frames in sizes]

    def pixels(self, vision: VisionEncoder, sample: int, number: int) -> Tensor:
        """Return what a vision encoder reads of an image's views. Raises LlavaError."""
        images = self.images[sample]
        image, count = images[number], sum(not isinstance(one, Video) for one in images)
        try:
            return self.views.read(vision, image, "", count)
        except LlavaError:  # once more, with the sample's name, which is looked up only now
            return self.views.read(vision, image, f"sample `{self.name(sample)}`", count)

    def pack(self, samples: Sequence[int]) -> PackedBatch:
        """Return the packed stream of these samples, on the CPU."""
        return pack([self.encoded(s) for s in samples], samples, self.visual_tokens)

    def batch(self, samples: Sequence[int], capacity: int) -> Batch:
        """Distribute the samples of a step over micro-batches of at most `capacity` rows.

        Packing is best-fit, within one step: the samples of a step stay those of the step.
        """
        groups = self.groups(samples)
        lengths = np.reshape(self.lengths_of(samples), (-1, self.together)).sum(axis=1)
        bins = best_fit(lengths.tolist(), capacity)
        return Batch(tuple(tuple(s for index in items for s in groups[index]) for items in bins))

    def groups(self, samples: Sequence[int]) -> list[tuple[int, ...]]:
        """Return samples in the groups that stay together, which they make up in order."""
        step = self.together
        return [tuple(map(int, samples[at : at + step])) for at in range(0, len(samples), step)]

    def epoch(
        self, seed: int, epoch: int, batch_size: int, capacity: int, done: int = 0
    ) -> Iterator[Batch]:
        """Yield the steps of one epoch after the first `done`; a step has `batch_size` groups.

        `seed` and `epoch` alone decide the order of samples. It is computed anew from them, so a
        resume within an epoch needs no stored state.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self) // self.together)
        # four bytes a sample: this is the only thing that each process keeps of all samples
        order = order.astype(np.int32)
        for begin in range(done * batch_size, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            if self.together > 1:
                chosen = (chosen[:, None] * self.together + np.arange(self.together)).ravel()
            if not isinstance(self.samples, range):
                chosen = self.samples[chosen]
            yield self.batch(chosen.tolist(), capacity)

    def steps(self, batch_size: int) -> int:
        """Return the number of optimisation steps of one epoch; the last one may be smaller."""
        return -(-(len(self) // self.together) // batch_size)


def reading(data: Dataset, model: LlavaModel, template: PromptTemplate, max_length: int) -> Reading:
    """Return what makes rows of a data set for a model.

    Raises DataError for a data set without samples.
    """
    if not len(data):
        raise DataError("the data set holds no samples; choose another")
    longest = min(max_length, model.language.max_length)
    return Reading(data, template, model.language.tokenizer, model.views, longest)
