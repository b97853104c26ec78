"""Where the images of each sample lie, so that no row is parsed again for them.

I images of all samples, N samples.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from llavakit import Dataset, ImageSource


class ImagePaths:
    """The images of a data set's samples: paths are kept, all else is asked of the data set.

    File names stand end to end in one text with the offset of each, folders are kept once: a Python
    object for each of a million paths would take ten times as much, and each process that reads
    images would come to hold a copy of it.
    """

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self._names = bytearray()
        self._ends = array("q", [0])  # [I + 1]
        self._folders: list[str] = []  # each with the separator behind it
        self._folder_numbers: dict[str, int] = {}
        self._folder_of = array("i")  # [I]
        self._firsts = array("q", [0])  # [N + 1]: of each sample the number of its first image
        self._asked: set[int] = set()  # samples with images that are no paths

    def append(self, images: Sequence[ImageSource]) -> None:
        """Add the images of the next sample."""
        if all(isinstance(image, Path) for image in images):
            for image in images:
                folder, separator, name = str(image).rpartition(os.sep)
                # names in JSON may hold lone surrogates, and those of files any byte
                self._names += name.encode("utf-8", "surrogatepass")
                self._ends.append(len(self._names))
                number = self._folder_numbers.setdefault(folder + separator, len(self._folders))
                if number == len(self._folders):
                    self._folders.append(folder + separator)
                self._folder_of.append(number)
        else:
            self._asked.add(len(self._firsts) - 1)
        self._firsts.append(len(self._folder_of))

    def __getitem__(self, sample: int) -> Sequence[ImageSource]:
        """Return the images of a sample, in the order of its placeholders."""
        if sample in self._asked:
            return self._data[sample].images
        return [self._path(image) for image in range(*self._firsts[sample : sample + 2])]

    def _path(self, image: int) -> Path:
        begin, end = self._ends[image : image + 2]
        name = self._names[begin:end].decode("utf-8", "surrogatepass")
        return Path(self._folders[self._folder_of[image]] + name)
