"""The images of a corpus, each once, and their features by a frozen encoder.

I uses of images, P patches of a view, D width of the vision encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llavakit import LlavaModel, VisionEncoder
from llavakit_plugins.datasets.columns import Column
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.forks import fork_pool, may_fork, threads
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
    does so, to the same bits. Must be closed. Raises LlavaError for an image that cannot be read,
    and where a process was killed.
    """
    encoder = _Encoder(corpus, model, dtype, preparing or model.vision)
    if processes == 1:
        yield from encoder.encode(images, progress)
        return
    pieces = [images[begin : begin + _PIECE] for begin in range(0, len(images), _PIECE)]
    done = 0
    with _mapped(encoder, processes) as encoded:
        for piece, (raw, shape) in zip(pieces, encoded(pieces), strict=True):
            yield torch.from_numpy(raw).view(encoder.dtype).view(shape)
            done += len(piece)
            progress(done, len(images), "encoding images")


class _Encoder(NamedTuple):
    corpus: Corpus
    model: LlavaModel
    dtype: torch.dtype
    preparing: VisionEncoder

    def encode(
        self, images: Sequence[Image], progress: Callable[[int, int, str], object]
    ) -> Iterator[Tensor]:
        """Yield the features of views, a batch at a time."""
        waiting: list[Tensor] = []
        for done, image in enumerate(images, start=1):
            waiting.append(self.corpus.pixels(self.preparing, *image))
            # an image may have many views, and a video has: no more than needed are held
            if done < len(images) and sum(map(len, waiting)) < _ENCODE_BATCH:
                continue
            for batch in torch.cat(waiting).split(_ENCODE_BATCH):
                with torch.no_grad():
                    yield self.model.features(batch.to(self.model.device, self.dtype))
            waiting.clear()
            progress(done, len(images), "encoding images")

    def sent(self, images: Sequence[Image]) -> _Sent:
        """Return the features of views at once, as another process can be sent them."""
        found = torch.cat(list(self.encode(images, lambda *_: None)))
        return found.view(torch.uint8).numpy(), tuple(found.shape)


_Sent = tuple[npt.NDArray[np.uint8], tuple[int, ...]]
"""The bytes of features, whatever their type, and their shape."""
_Mapped = Callable[[Sequence[Sequence[Image]]], Iterator[_Sent]]
_of_fork: list[_Encoder] = []


@contextmanager
def _mapped(encoder: _Encoder, processes: int) -> Iterator[_Mapped]:
    """Yield what encodes pieces by one thread each, in forks where there may be some."""
    if not may_fork():
        with threads(1):
            yield partial(map, encoder.sent)
        return

    def begin() -> None:
        torch.set_num_threads(1)  # GNU's OpenMP waits for ever for threads that were not forked
        _of_fork.append(encoder)

    with fork_pool(processes, "encoded images", begin) as pool:
        yield partial(pool.map, _encode)


def _encode(images: Sequence[Image]) -> _Sent:
    return _of_fork[0].sent(images)


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
