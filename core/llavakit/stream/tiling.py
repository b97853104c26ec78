"""How an image becomes views for the encoder, and R rows of the stream. Without torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from llavakit.contracts.component import Component

if TYPE_CHECKING:
    from PIL.Image import Image


class View(NamedTuple):
    """A square that the encoder reads: its edge in pixels, and its embeddings (P')."""

    size: int
    tokens: int


class Shown(NamedTuple):
    """What an image's rows may depend on, all known before it is decoded."""

    width: int
    height: int
    images: int = 1  #: How many images its sample has, itself included.


class Arrangement(NamedTuple):
    """Which of its views' embeddings `[views * P', E]` the rows of an image are."""

    views: int
    index_RK: npt.NDArray[np.int64]  #: K is 1 as a rule; -1 for the learned row `image_newline`.
    weights_RK: npt.NDArray[np.float32] | None = None  #: A row is a sum of K, so weighted.
    overview: tuple[int, int] | None = None  #: Height and width of the first rows: the image.


def joined(images: Sequence[Arrangement], tokens: int) -> Arrangement:
    """Return the rows of several images, one behind the other; a view has `tokens` embeddings."""
    width = max((image.index_RK.shape[1] for image in images), default=1)
    indices, weights = [np.zeros((0, width), np.int64)], [np.zeros((0, width), np.float32)]
    views = 0
    for image in images:
        own, index_RK = image.weights_RK, image.index_RK
        index_RK = np.where(index_RK < 0, -1, index_RK + views * tokens)
        if width > 1:
            missing = ((0, 0), (0, width - index_RK.shape[1]))  # of embeddings that weigh nothing
            weights.append(np.pad(np.ones_like(index_RK, "f4") if own is None else own, missing))
            index_RK = np.pad(index_RK, missing, "edge")
        indices.append(index_RK)
        views += image.views
    weights_RK = np.concatenate(weights) if width > 1 else None
    return Arrangement(views, np.concatenate(indices), weights_RK)


class Tiling(Component):
    """Cuts images into views and arranges their embeddings. Built as `Tiling(options)`."""

    hook = "llava_tilings"
    separates: bool = False  #: Whether it asks for the learned row.
    varies: bool = True  #: Whether it looks at sizes; False: every image is one view, in order.

    @abstractmethod
    def arrange(self, shown: Shown, view: View) -> Arrangement:
        """Return an image's rows. Raises ModelError for views that it cannot lay out."""

    @abstractmethod
    def cut(self, image: Image, shown: Shown, view: View) -> Sequence[Image]:
        """Return the views of an RGB image, as many as `arrange` says, for `prepare` to read."""
