"""Where the images of each sample lie, so that no row is parsed again for them.

I uses of images by all samples, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llavakit import Dataset, ImageFile, ImageSource
from llavakit.contracts.data import Video
from llavakit_plugins.datasets.columns import Column, Columns


class ImagePaths:
    """The images of a data set's samples: paths are kept, all else is asked of the data set.

    Paths stand end to end in one column of bytes with the end of each: a Python object for each of
    a million paths would take ten times as much, and each process that reads images would come to
    hold a copy of it.
    """

    def __init__(self, columns: Columns, data: Dataset) -> None:
        self._data = data
        self._names, self._ends = columns["names"], columns["name_ends"]  # [I]
        self._of_samples = columns["image_ends"]  # [N]
        self.identities: Column = columns["identities"]
        """`[I, 2]` of uint64: equal for two uses of one image, which look the same in both."""

    def uses(self, sample: int) -> range:
        """Return the numbers of a sample's images among all uses of images."""
        begin = int(self._of_samples[sample - 1]) if sample else 0
        return range(begin, int(self._of_samples[sample]))

    def uses_of(self, samples: range | Column) -> Column:
        """Return the numbers of many samples' images, in order."""
        if isinstance(samples, range):
            return np.arange(self.uses(samples[0]).start, self.uses(samples[-1]).stop)
        numbers = np.asarray(samples, np.int64)
        ends = self._of_samples[numbers]
        begins = np.where(numbers > 0, self._of_samples[numbers - 1], 0)
        counts = ends - begins
        before = np.cumsum(counts) - counts
        uses: Column = np.arange(counts.sum()) + np.repeat(begins - before, counts)
        return uses

    def of_use(self, use: int) -> tuple[int, int]:
        """Return the sample of a use of an image, and which of its images it is."""
        sample = int(np.searchsorted(self._of_samples, use, side="right"))
        return sample, use - self.uses(sample).start

    def __getitem__(self, sample: int) -> Sequence[ImageSource]:
        """Return the images of a sample, in the order of its placeholders."""
        names = [self._name(use) for use in self.uses(sample)]
        if all(names):
            return [Path(name) for name in names]
        return self._data[sample].images

    def _name(self, use: int) -> str:
        begin = int(self._ends[use - 1]) if use else 0
        name = self._names[begin : int(self._ends[use])].tobytes()
        return name.decode("utf-8", "surrogatepass")


def name_of(image: ImageSource) -> bytes:
    """Return the bytes under which a path is kept; none for what is no path."""
    # names in JSON may hold lone surrogates, and those of files any byte
    return str(image).encode("utf-8", "surrogatepass") if isinstance(image, Path) else b""


def identity_of(image: ImageSource, where: tuple[int, int], seen: object) -> bytes:
    """Return 16 bytes that are the same for one image only; `seen` is what its views depend on.

    Pixels in memory have no name: each of them, the `where[1]`th of sample `where[0]`, is one of
    its own.
    """
    source = image.source if isinstance(image, Video) else image
    if isinstance(source, str | Path | ImageFile):  # a path first: a Protocol is asked slowly
        return _identity_of_name(type(image).__name__, str(source), seen)
    known = isinstance(source, bytes)
    content = source if isinstance(source, bytes) else repr(where).encode()
    return _identity(type(image).__name__.encode() if known else b"", content, seen)


@lru_cache(maxsize=1024)  # rows about one image often stand together
def _identity_of_name(kind: str, name: str, seen: object) -> bytes:
    return _identity(kind.encode(), name.encode("utf-8", "surrogatepass"), seen)


def _identity(kind: bytes, content: bytes, seen: object) -> bytes:
    found = blake2b(content, digest_size=16, person=kind[:16])
    found.update(b"" if seen is None else repr(seen).encode())
    return found.digest()
