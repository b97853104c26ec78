"""Where the patch features of a micro-batch come from: the encoder, or a cache of its output.

I images, P patches, D vision width.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset as TorchDataset

from llavakit import (
    Build,
    LlavaError,
    LlavaModel,
    PackedBatch,
    TrainingError,
    Use,
    VisionEncoder,
    read_pixels,
)
from llavakit.contracts.data import ImageSource
from llavakit.contracts.packing import upload
from llavakit_plugins.training.corpus import Corpus

_ENCODE_BATCH = 32
CACHE_BYTES = 4 << 30


def preparation(model: LlavaModel, changes: Mapping[str, Any], build: Build) -> VisionEncoder:
    """Return who prepares images: the encoder, or one with some options changed, without weights.

    Raises TrainingError where the encoder has no such options, or they would change its size.
    """
    if not changes:
        return model.vision
    choice = {**model.choices["vision"], **changes}
    try:
        with torch.device("meta"):
            changed = build(Use[VisionEncoder].model_validate(choice))
    except ValidationError as error:
        found = "; ".join(f"`{'.'.join(map(str, e['loc']))}`: {e['msg']}" for e in error.errors())
        raise TrainingError(f"`prepare` of `{model.vision.name}`: {found}; fix it") from error
    if changed.image_size != model.vision.image_size:
        raise TrainingError(
            f"`prepare` changes the size of images to {changed.image_size}, but the encoder reads "
            f"{model.vision.image_size}; change it under [model.vision]"
        )
    return changed


class Features(Protocol):
    """Gives micro-batches with the features of their images."""

    def load(self, micros: Iterable[Sequence[int]]) -> Generator[tuple[PackedBatch, Tensor | None]]:
        """Yield each micro-batch, on the device, with features `[I, P, D]` or None.

        `micros` may be read ahead of what is yielded. Uses up no random number.
        """


class Encoding:
    """Encodes the images of each micro-batch when it is its turn; `workers` processes read them
    before, so that an encoder on a GPU need not wait."""

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
        loader = DataLoader(
            _MicroBatches(self._corpus, self._preparing),
            batch_size=None,
            sampler=micros,
            num_workers=self._workers,
            # otherwise, from Python 3.14 on, each would be sent the whole model
            multiprocessing_context="fork" if self._workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),
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
    """Micro-batches by their samples, with the pixels of their images.

    What is wrong with an image is returned: raised in a worker, it would come as a traceback.
    """

    def __init__(self, corpus: Corpus, vision: VisionEncoder) -> None:
        self._corpus, self._vision = corpus, vision

    def __getitem__(self, samples: Sequence[int]) -> tuple[PackedBatch, Tensor | None] | LlavaError:
        batch = self._corpus.pack(samples)
        pixels = []
        for sample, number in batch.images:
            item = self._corpus.data[sample]
            try:
                pixels.append(read_pixels(self._vision, item.images[number], f"sample `{item.id}`"))
            except LlavaError as error:
                return error
        return batch, torch.stack(pixels) if pixels else None


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and SIGTERM often come to a whole group: the training process says when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Cached:
    """Keeps the features of every image of a frozen encoder in memory."""

    def __init__(
        self,
        corpus: Corpus,
        model: LlavaModel,
        *,
        dtype: torch.dtype,
        progress: Callable[[int, int, str], None],
        preparing: VisionEncoder | None = None,
    ) -> None:
        self._corpus, self._device = corpus, model.device
        vision = preparing or model.vision
        self._row_of, sources = index_images(corpus)
        self._features: Tensor | None = None
        with torch.no_grad():
            for begin in range(0, len(sources), _ENCODE_BATCH):
                part = sources[begin : begin + _ENCODE_BATCH]
                pixels = [read_pixels(vision, image, name) for image, name in part]
                batch = torch.stack(pixels).to(model.device, dtype)
                found = model.features(batch)
                if self._features is None:  # at once: joined from pieces they would be there twice
                    shape = (len(sources), *found.shape[1:])
                    self._features = torch.empty(shape, dtype=found.dtype)
                self._features[begin : begin + len(part)] = found
                progress(begin + len(part), len(sources), "encoding images")

    def load(self, micros: Iterable[Sequence[int]]) -> Generator[tuple[PackedBatch, Tensor | None]]:
        for samples in micros:
            batch = self._corpus.pack(samples)
            features = None
            if batch.images and self._features is not None:
                rows = torch.tensor([self._row_of[image] for image in batch.images])
                features = upload(self._features.index_select(0, rows), self._device)
            yield batch.to(self._device), features


def index_images(
    corpus: Corpus,
) -> tuple[dict[tuple[int, int], int], list[tuple[ImageSource, str]]]:
    """Return the number of each (sample, image), and every distinct image once."""
    numbers: dict[object, int] = {}
    row_of: dict[tuple[int, int], int] = {}
    sources: list[tuple[ImageSource, str]] = []
    for index in corpus.samples:
        sample = corpus.data[index]
        for number, image in enumerate(sample.images):
            key = _identity(image)
            if key not in numbers:
                numbers[key] = len(sources)
                sources.append((image, f"sample `{sample.id}`"))
            row_of[index, number] = numbers[key]
    return row_of, sources


def images_recur(corpus: Corpus, epochs: int, most: int) -> bool:
    """Say whether any image is met again, and there are at most so many; stops where it knows."""
    seen: set[object] = set()
    mentions = 0
    for index in corpus.samples:
        for image in corpus.data[index].images:
            seen.add(_identity(image))
            mentions += 1
        if len(seen) > most:
            return False
    return mentions * epochs > len(seen)


def _identity(image: ImageSource) -> object:
    return image if isinstance(image, Path) else id(image)
