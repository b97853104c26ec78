"""Looks at each distinct image of a data set once, while its rows are read.

Ten million paths would take over a gigabyte as texts. Of those that were looked at only 64 bits
each are kept, and the text of the ones that cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import compress
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from llavakit import DataError, ImageSource, Video, and_more
from llavakit_plugins.datasets.image_files import check_image, whole_images
from llavakit_plugins.media import MissingImage

Hashes: TypeAlias = npt.NDArray[np.int64]

_AT_ONCE = 4096  # images: as many as `whole_images` reads at once
_SHOWN_EVERY = 256  # images
_NAMED = 3
_LARGEST = 1 << 20  # hashes of a block: what is merged is in memory twice


class DistinctHashes:
    """The 64-bit hashes seen so far, in eight bytes each: a set of Python takes 60 or more."""

    def __init__(self) -> None:
        self._blocks: list[Hashes] = []  # each sorted, and shorter behind than in front

    def add(self, hashes_N: Hashes) -> npt.NDArray[np.bool_]:
        """Add hashes; return which of them were not there before the call."""
        new_N = np.ones(len(hashes_N), np.bool_)
        for block in self._blocks:
            places_N = np.searchsorted(block, hashes_N)
            new_N &= block[np.minimum(places_N, len(block) - 1)] != hashes_N
        if new_N.any():
            self._blocks.append(np.unique(hashes_N[new_N]))
        while len(self._blocks) > 1 and _belong_together(*map(len, self._blocks[-2:])):
            merged = np.concatenate(self._blocks[-2:])
            merged.sort()
            self._blocks[-2:] = [merged]
        return new_N


def _belong_together(longer: int, shorter: int) -> bool:
    # halves at least from block to block: there are few, and each hash is rarely moved
    return longer < 2 * shorter and longer + shorter <= _LARGEST


class DistinctImages:
    """Images and videos of rows, of which each is looked at once.

    Two paths of the same hash count as one (of ten million, a chance of 1 in 370,000): the second
    is then looked at only when training reads it.
    """

    def __init__(self, identity: Callable[[int], str], keep_names: bool) -> None:
        """`identity` returns the id of the row of a number; `keep_names` fills `names`."""
        self.looked_at = 0
        self.broken = 0
        self.names: set[str] = set()  #: Of what cannot be used.
        self.reasons: list[str] = []  #: Why the first of them cannot be used.
        self._identity, self._keep_names = identity, keep_names
        self._missing = 0
        self._missing_named: list[tuple[str, int]] = []  # the first, with their rows
        self._remedies: dict[str, None] = {}
        self._seen = DistinctHashes()
        # each is named by the first row that shows it; a video's key is never an image's
        self._waiting: dict[str | tuple[str], tuple[str | Video, int]] = {}

    @property
    def note(self) -> str:
        """What progress adds while there is something that cannot be used."""
        return f", {self.broken:,} cannot be used" if self.broken else ""

    @property
    def are_many(self) -> bool:
        """Whether as many wait as are read at once."""
        return len(self._waiting) >= _AT_ONCE

    def add(self, images: Iterable[ImageSource], number: int) -> None:
        """Let the images of a row wait for a look."""
        for image in images:
            if isinstance(image, Path):
                self._waiting.setdefault(str(image), (str(image), number))
            elif isinstance(image, Video):
                self._waiting.setdefault((name_of(image),), (image, number))

    def look(self, show: Callable[[int], None]) -> None:
        """Look at all that wait; now and then `show` is told how many there will be by then."""
        hashes_N = np.fromiter(map(hash, self._waiting), np.int64, len(self._waiting))
        new_N = self._seen.add(hashes_N)
        new = list(compress(self._waiting.values(), new_N))
        self._waiting.clear()
        total = self.looked_at + len(new)
        files = (image for image, _ in new if isinstance(image, str))
        # to its end, which ends its threads: an error's frames would keep a generator alive
        wholes = iter(list(whole_images(files)))
        for image, number in new:
            if self.looked_at % _SHOWN_EVERY == 0:
                show(total)
            if isinstance(image, Video) or not next(wholes):
                self._judge(image, number)
            self.looked_at += 1

    def refusal(self, path: Path, skip: str) -> DataError:
        """Return the error of a file of which images cannot be used; `skip` is a way out."""
        if self._missing:
            names = and_more(range(self._missing), _NAMED, self._spelt)
            return DataError(
                f"{path}: {self._missing} of {self.looked_at} images are missing: {names}; "
                f"{'; '.join(self._remedies)}, {skip}"
            )
        more = f" ({self.broken - 1} more cannot be used)" if self.broken > 1 else ""
        return DataError(f"{path}: {self.reasons[0]}{more}; {skip}")

    def _spelt(self, index: int) -> str:
        name, number = self._missing_named[index]
        return f"{name:.1000} (sample `{self._identity(number)}`)"

    def _judge(self, image: str | Video, number: int) -> None:
        try:
            check_image(image, f"sample `{self._identity(number)}`")
        except DataError as error:
            self.broken += 1
            if self._keep_names:
                self.names.add(name_of(image))
            if len(self.reasons) < _NAMED:
                self.reasons.append(str(error))
            if isinstance(error, MissingImage):
                self._missing += 1
                self._remedies[error.remedy] = None
                if len(self._missing_named) < _NAMED:
                    self._missing_named.append((name_of(image), number))


def name_of(image: ImageSource) -> str:
    """Return the path or address of an image or a video."""
    return str(image.source if isinstance(image, Video) else image)
