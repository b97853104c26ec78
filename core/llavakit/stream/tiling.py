"""How an image or a video becomes views for the encoder, and R rows of the stream. Without torch.

I images, Q rows that a connector reads, K embeddings that a row is made of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from llavakit.contracts.component import Component

if TYPE_CHECKING:
    from PIL.Image import Image

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class View(NamedTuple):
    """A square that the encoder reads: its edge in pixels, and its embeddings (P')."""

    size: int
    tokens: int


class Shown(NamedTuple):
    """What an image's rows may depend on, all known before it is decoded."""

    width: int
    height: int
    images: int = 1  #: How many images its sample has, itself included; videos do not count.
    frames: int = 0  #: How many frames of a video are shown; 0: it is an image.


class Clip(NamedTuple):
    """What the header of a video says."""

    width: int
    height: int
    frames: int
    rate: float  #: Frames a second; 0 where it says none, as a folder of images does.


class Arrangement(NamedTuple):
    """Which of its views' embeddings `[views * P', E]` the rows of an image are."""

    views: int
    index_RK: IntArray  #: K is 1 as a rule; -1 for the learned row `image_newline`.
    weights_RK: FloatArray | None = None  #: A row is a sum of K, so weighted.
    overview: tuple[int, int] | None = None  #: Height and width of the first rows: the image.
    pools: bool = False
    """Whether rows are made of the encoder's features, and the connector reads those rows (see
    `Tiling.pools`). Then K of them without weights are the largest of each."""


class Taps(NamedTuple):
    """Rows that are made of others: an index, and weights where they are sums."""

    index_RK: IntArray
    weights_RK: FloatArray | None


class Joined(NamedTuple):
    """The rows of several images, one behind the other."""

    rows: Taps  #: Made of the embeddings that the connector gives.
    embeddings: int  #: How many it gives.
    pooled: Taps | None  #: What it reads in place of all features, where some are pooled.


def joined(images: Sequence[Arrangement], tokens: int) -> Joined:
    """Return the rows of several images, one behind the other; a view has `tokens` embeddings."""
    counts = [image.views * tokens for image in images]
    rows = [Taps(image.index_RK, image.weights_RK) for image in images]
    if not any(image.pools for image in images):
        return Joined(_stacked(rows, counts), sum(counts), None)
    features, read = [Taps(np.arange(count)[:, None], None) for count in counts], counts[:]
    for number, image in enumerate(images):
        if image.pools:
            shows = image.index_RK[:, 0] >= 0
            weights = None if image.weights_RK is None else image.weights_RK[shows]
            features[number] = Taps(image.index_RK[shows], weights)
            rows[number] = Taps(np.where(shows, shows.cumsum() - 1, -1)[:, None], None)
            read[number] = int(shows.sum())
    return Joined(_stacked(rows, read), sum(read), _stacked(features, counts))


def _stacked(parts: Sequence[Taps], counts: Sequence[int]) -> Taps:
    """Return rows behind one another; each part is made of so many of the embeddings."""
    width = max((part.index_RK.shape[1] for part in parts), default=1)
    plain = all(one.weights_RK is None for one in parts)
    indices, weights = [np.zeros((0, width), np.int64)], [np.zeros((0, width), np.float32)]
    begin = 0
    for (index_RK, own), count in zip(parts, counts, strict=True):
        index_RK = np.where(index_RK < 0, -1, index_RK + begin)
        begin += count
        missing = ((0, 0), (0, width - index_RK.shape[1]))  # of embeddings that weigh nothing
        weights.append(np.pad(np.ones_like(index_RK, "f4") if own is None else own, missing))
        indices.append(np.pad(index_RK, missing, "edge"))
    return Taps(np.concatenate(indices), None if plain or width == 1 else np.concatenate(weights))


class Tiling(Component):
    """Cuts images into views and arranges their embeddings. Built as `Tiling(options)`."""

    hook = "llava_tilings"
    separates: bool = False  #: Whether it asks for the learned row.
    varies: bool = True  #: Whether it looks at sizes; False: every image is one view, in order.
    pools: bool = False  #: Whether it makes rows of features, for a connector of single patches.

    def sample(self, clip: Clip) -> Sequence[int] | None:
        """Return which frames of a video are shown, ascending; None: it shows no videos."""
        return None

    @abstractmethod
    def arrange(self, shown: Shown, view: View) -> Arrangement:
        """Return an image's rows. Raises ModelError for views that it cannot lay out."""

    @abstractmethod
    def cut(self, image: Image, shown: Shown, view: View) -> Sequence[Image]:
        """Return the views of an RGB image, as many as `arrange` says, for `prepare` to read.

        Of a video it is asked for each frame; together they are as many.
        """
