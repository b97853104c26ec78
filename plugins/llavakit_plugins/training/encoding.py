"""The images of a corpus, each once, and their features by a frozen encoder.

I uses of images, P patches of a view, D width of the vision encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llavakit import LlavaModel, VisionEncoder
from llavakit_plugins.datasets.columns import Column
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.forked import forked
from llavakit_plugins.training.image_paths import ImagePaths

_ENCODE_BATCH = 32  # views that are encoded at once
_PIECE = 8 * _ENCODE_BATCH  # images that a process encodes before it sends what came of them

Image = tuple[int, int]
"""A sample, and which of its images."""


def encode_images(
    corpus: Corpus,
    model: LlavaModel,
    images: Sequence[Image],
    dtype: torch.dtype,
    progress: Callable[[int, int, str], None],
    preparing: VisionEncoder | None = None,
    processes: int = 1,
) -> Iterator[Tensor]:
    """Yield the features of the views of images, in their order.

    On a CPU several processes may encode, each with one thread; where none may be forked, this one
    does so, to the same bits. Raises LlavaError for an image that cannot be read, and where a
    process was killed.
    """
    if processes == 1:
        yield from _encode(corpus, model, images, dtype, progress, preparing)
        return
    pieces = [images[begin : begin + _PIECE] for begin in range(0, len(images), _PIECE)]

    def share(number: int) -> Iterator[tuple[int, torch.dtype, npt.NDArray[np.uint8]]]:
        for index in range(number, len(pieces), processes):
            batches = _encode(corpus, model, pieces[index], dtype, lambda *_: None, preparing)
            found = torch.cat(list(batches))
            # numpy has not all of PyTorch's types
            yield index, found.dtype, found.view(torch.uint8).numpy()

    held: dict[int, Tensor] = {}
    done = due = 0
    with closing(forked(processes, share, "encoded images")) as encoded:
        for index, kind, raw in encoded:
            held[index] = torch.from_numpy(raw).view(kind)
            done += len(pieces[index])
            progress(done, len(images), "encoding images")
            while due in held:
                yield held.pop(due)
                due += 1


def _encode(
    corpus: Corpus,
    model: LlavaModel,
    images: Sequence[Image],
    dtype: torch.dtype,
    progress: Callable[[int, int, str], object],
    preparing: VisionEncoder | None,
) -> Iterator[Tensor]:
    """Yield the features of the views of images, a batch at a time."""
    vision = preparing or model.vision
    waiting: list[Tensor] = []
    for done, image in enumerate(images, start=1):
        waiting.append(corpus.pixels(vision, *image))
        # an image may have many views, and a video has: no more than needed are held
        if done < len(images) and sum(map(len, waiting)) < _ENCODE_BATCH:
            continue
        for batch in torch.cat(waiting).split(_ENCODE_BATCH):
            with torch.no_grad():
                yield model.features(batch.to(model.device, dtype))
        waiting.clear()
        progress(done, len(images), "encoding images")


class DistinctImages(NamedTuple):
    """The images of a corpus, each once, in the order in which samples first show them."""

    distinct: Sequence[Image]
    first_views: Column  #: The first view of each among the views of all, then how many there are.
    numbers: Column  #: `[I]` int32: of each use of an image, which of the distinct ones it is.
    images: ImagePaths

    def number(self, sample: int, image: int) -> int:
        """Return which of the distinct images a sample's image is."""
        return int(self.numbers[self.images.uses(sample)[image]])


def distinct_images(corpus: Corpus) -> DistinctImages:
    """Return the images that the samples of training show."""
    uses = corpus.images.uses_of(corpus.samples)
    identities = corpus.images.identities[uses]
    order = np.lexsort((identities[:, 1], identities[:, 0]))  # stable: the first use comes first
    begins = np.ones(len(order), np.bool_)
    begins[1:] = (identities[order[1:]] != identities[order[:-1]]).any(axis=1)
    firsts = order[begins]
    place = np.empty(len(firsts), np.int32)
    place[np.argsort(firsts)] = np.arange(len(firsts), dtype=np.int32)
    numbers = np.full(len(corpus.images.identities), -1, np.int32)
    numbers[uses[order]] = place[np.cumsum(begins) - 1]
    distinct = [corpus.images.of_use(int(use)) for use in uses[np.sort(firsts)]]
    views = np.ones(len(distinct), np.int64)
    if corpus.views.tiling is not None:
        shown = (corpus.shown(sample)[image] for sample, image in distinct)
        views[:] = [corpus.views.of(one).views for one in shown]
    first_views = np.concatenate([[0], np.cumsum(views)])
    return DistinctImages(distinct, first_views, numbers, corpus.images)
