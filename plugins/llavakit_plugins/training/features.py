"""Provides the patch features of micro-batches: from the encoder, or from a cache of its output.

Shapes: I images, P patches of an image, D width of the vision encoder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset as TorchDataset

from llavakit import (
    LlavaError,
    LlavaModel,
    PackedBatch,
    Run,
    VisionEncoder,
)
from llavakit.contracts.packing import upload
from llavakit_plugins.datasets.columns import Column
from llavakit_plugins.training.agreement import in_each
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.encoding import distinct_images, encode_images
from llavakit_plugins.training.feature_cache import Kept
from llavakit_plugins.training.forked import shares_for
from llavakit_plugins.training.forks import begin_helper, is_helper
from llavakit_plugins.training.options import TrainOptions
from llavakit_plugins.training.preparing import preparation

_START = "fork" if sys.platform == "linux" else "spawn"
_MOST_WORKERS = 8
_LOOKED_AT = 1 << 20  # samples whose images are looked at together
CACHE_BYTES = 4 << 30
"""Most bytes of CPU memory that the cache may take when nothing is stated."""


def features_of(corpus: Corpus, model: LlavaModel, options: TrainOptions, run: Run) -> Features:
    """Return what loads micro-batches of a corpus, as the options of a step ask for."""
    learns = "vision" in options.train
    dtype = next(model.vision.parameters()).dtype
    preparing = preparation(model, options.prepare, run.build)
    processes = shares_for(model, run.process_group, options.processes)
    if options.feature_cache is not None:
        most = int(options.feature_cache_gb * 1e9)
        return Kept(
            corpus, model, dtype=dtype, run=run, folder=options.feature_cache, most=most,
            preparing=preparing, changes=options.prepare, processes=processes,
        )  # fmt: skip
    if not learns and worth_caching(corpus, model, options):
        how: dict[str, Any] = {
            "dtype": dtype, "progress": run.progress, "preparing": preparing,
            "processes": processes,
        }  # fmt: skip
        return in_each(run.process_group, lambda: Cached(corpus, model, **how))
    workers = options.workers
    if workers is None:
        share = (os.cpu_count() or 1) // run.process_group.size
        # on a CPU all cores are busy with training
        workers = 0 if model.device.type == "cpu" else max(1, min(_MOST_WORKERS, share))
    return Encoding(corpus, model, workers=workers, dtype=dtype, learns=learns, preparing=preparing)


def worth_caching(corpus: Corpus, model: LlavaModel, options: TrainOptions) -> bool:
    """Say whether the features of a frozen encoder are kept for the next epoch."""
    if options.cache_features is not None:
        return options.cache_features
    view = model.vision.tokens(model.vision.image_size) * model.vision.width
    return images_recur(corpus, options.epochs, int(CACHE_BYTES / (4 * view * corpus.mean_views)))


class Features(Protocol):
    """Loads micro-batches together with the features of their images."""

    def load(self, micros: Iterable[Sequence[int]]) -> Generator[tuple[PackedBatch, Tensor | None]]:
        """Yield each micro-batch, on the device, with features `[I, P, D]`, or None without images.

        `micros` holds the samples of each micro-batch; it may be read ahead of what is yielded.
        Does not use the global random state, so that a resumed run draws the same numbers.
        """


class Encoding:
    """Encodes the images of each micro-batch when the micro-batch is due.

    `workers` processes read and prepare images ahead, so that the GPU does not wait for them.
    """

    def __init__(
        self,
        corpus: Corpus,
        model: LlavaModel,
        *,
        workers: int,
        dtype: torch.dtype,
        learns: bool,
        preparing: VisionEncoder | None = None,
    ) -> None:
        self._corpus, self._model = corpus, model
        self._preparing = preparing or model.vision
        self._workers, self._dtype, self._learns = workers, dtype, learns

    def load(self, micros: Iterable[Sequence[int]]) -> Generator[tuple[PackedBatch, Tensor | None]]:
        device = self._model.device
        # what was itself begun as a helper may begin no other process
        workers = 0 if is_helper() else self._workers
        loader = DataLoader(
            _MicroBatches(self._corpus, self._preparing),
            batch_size=None,
            sampler=micros,
            num_workers=workers,
            # Python 3.14 made "forkserver" the default. It would pickle the data set, and with it
            # the whole model, for each worker; a fork shares them. Only Linux forks safely.
            multiprocessing_context=_START if workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=begin_helper,
            generator=torch.Generator(),  # the loader draws a seed: not from the global generator
        )
        for item in loader:
            if isinstance(item, LlavaError):
                raise item
            batch, pixels = item
            features = None
            if pixels is not None:
                pixels = pixels.to(device, self._dtype, non_blocking=True)
                with torch.set_grad_enabled(self._learns):
                    features = self._model.features(pixels)
            yield batch.to(device), features


class _MicroBatches(TorchDataset[tuple[PackedBatch, Tensor | None] | LlavaError]):
    """Maps the samples of a micro-batch to its packed stream and the pixels of its images.

    An error about an image is returned, not raised: the DataLoader would turn an exception of a
    worker into one with a traceback as its text.
    """

    def __init__(self, corpus: Corpus, vision: VisionEncoder) -> None:
        self._corpus, self._vision = corpus, vision

    def __getitem__(self, samples: Sequence[int]) -> tuple[PackedBatch, Tensor | None] | LlavaError:
        batch = self._corpus.pack(samples)
        try:
            pixels = [self._corpus.pixels(self._vision, *image) for image in batch.images]
        except LlavaError as error:
            return error
        return batch, torch.cat(pixels) if pixels else None


class Cached:
    """Keeps the features of every image in CPU memory. Only right while the encoder is frozen."""

    def __init__(
        self,
        corpus: Corpus,
        model: LlavaModel,
        *,
        dtype: torch.dtype,
        progress: Callable[[int, int, str], None],
        preparing: VisionEncoder | None = None,
        processes: int = 1,
    ) -> None:
        self._corpus, self._device = corpus, model.device
        self._images = distinct_images(corpus)
        first_views = self._images.first_views
        self._features: Tensor | None = None
        filled = 0
        for found in encode_images(
            corpus, model, self._images.distinct, dtype, progress, preparing, processes
        ):
            if self._features is None:  # allocated once: `torch.cat` would need it twice
                shape = (int(first_views[-1]), *found.shape[1:])
                self._features = torch.empty(shape, dtype=found.dtype)
            self._features[filled : filled + len(found)] = found
            filled += len(found)

    def load(self, micros: Iterable[Sequence[int]]) -> Generator[tuple[PackedBatch, Tensor | None]]:
        for samples in micros:
            batch = self._corpus.pack(samples)
            features = None
            if batch.images and self._features is not None:
                images = [self._images.number(*image) for image in batch.images]
                views = [range(*self._images.first_views[n : n + 2]) for n in images]
                rows = torch.tensor([row for of_image in views for row in of_image])
                features = upload(self._features.index_select(0, rows), self._device)
            yield batch.to(self._device), features


def images_recur(corpus: Corpus, epochs: int, most: int) -> bool:
    """Return whether images are used more than once in training, and at most `most` are distinct.

    Stops once there are more than `most`, so that a huge data set is not read to its end.
    """
    seen: Column = np.zeros(0, np.uint64)
    mentions = 0
    for begin in range(0, len(corpus), _LOOKED_AT):
        uses = corpus.images.uses_of(corpus.samples[begin : begin + _LOOKED_AT])
        # half of an identity is enough to count by
        seen = np.union1d(seen, corpus.images.identities[uses, 0])
        mentions += len(uses)
        if len(seen) > most:
            return False
    return mentions * epochs > len(seen)
