"""Where each sample of tar shards lies: found once, kept in a file that all processes map.

N samples, I images, S shards.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llavakit import DataError, explain_write
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.columns import Columns, Stored, write_columns
from llavakit_plugins.datasets.image_files import check_image
from llavakit_plugins.datasets.shard_rows import choose_text, read_row
from llavakit_plugins.datasets.stored_files import StoredFile, UnreadFile, is_elsewhere
from llavakit_plugins.datasets.tar_shards import Group, Span, TarImage, read_groups

_VERSION = 3  # of the index, and of what is checked when it is made
_KEPT = 20  # sentences about samples of one shard
_AT_ONCE = 8  # shards that come over a network
_PAUSE = 0.1  # seconds between looks at what another process indexes

_COLUMNS = {
    "texts": 2,  # of each sample: where its text begins, and how many bytes it has
    "image_ends": 1,  # of each sample, among all images
    "name_ends": 1,  # of each sample, among all names: its key and extensions, as JSON
    "unusable": 1,  # of each sample: whether it is
    "images": 2,  # of each image: where it begins, and how many bytes it has
    "shard_ends": 1,  # of each shard, among all samples
    "names": 1,
}
"""The columns of an index, and how many dimensions each has."""


class Entry(NamedTuple):
    """Where a sample lies."""

    shard: StoredFile
    key: str
    extension: str
    """Of the member that says what the sample is."""
    text: Span
    images: Mapping[str, TarImage]
    """And videos, by extension."""


class TarIndex:
    """The samples of shards, in the shards' order. Can be pickled: processes map the same file."""

    def __init__(self, path: Path, shards: Sequence[StoredFile]) -> None:
        self.path, self.shards = path, shards
        columns = Columns.open(self.path)
        self.faults: list[str] = columns.facts["faults"]
        """What is wrong with the first samples that cannot be used."""
        self._texts_N2, self._images_I2 = columns["texts"], columns["images"]
        self._image_ends_N, self._name_ends_N = columns["image_ends"], columns["name_ends"]
        self._unusable_N, self._names = columns["unusable"], columns["names"]
        self._ends_S = columns["shard_ends"].tolist()

    @property
    def unusable(self) -> npt.NDArray[np.int64]:
        """The numbers of samples that cannot be used, ascending."""
        return np.flatnonzero(self._unusable_N)

    @property
    def text_bytes(self) -> npt.NDArray[np.int64]:
        """How many bytes say what each sample is."""
        return self._texts_N2[:, 1]

    def __len__(self) -> int:
        return len(self._texts_N2)

    def __getitem__(self, number: int) -> Entry:
        ends = self._image_ends_N, self._name_ends_N
        image, name = (int(end[number - 1]) if number else 0 for end in ends)
        shard = self.shards[bisect_right(self._ends_S, number)]
        names = self._names[name : self._name_ends_N[number]].tobytes()
        key, extension, *extensions = json.loads(names)
        spans = self._images_I2[image : self._image_ends_N[number]].tolist()
        images = {
            found: TarImage(shard, f"{key}.{found}", *span)
            for found, span in zip(extensions, spans, strict=True)
        }
        return Entry(shard, key, extension, Span(*self._texts_N2[number].tolist()), images)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self.shards)


def _reopened(path: Path, shards: Sequence[StoredFile]) -> TarIndex:
    """Return the index of a process in this one, which may be of another machine.

    That has an index of its own where it has copies of the shards, or another cache folder.
    """
    here = [shard.seen_here() for shard in shards]
    if here == list(shards) and _usable(path):
        return TarIndex(path, here)
    return open_index(here, path.parent, lambda *_, **__: None)[0]


def index_folder() -> Path:
    """Return the folder of this user where indices are kept when none is stated."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "llavakit" / "shards"


def open_index(
    shards: Sequence[StoredFile], folder: Path, progress: Progress, limit: int | None = None
) -> tuple[TarIndex, dict[str, str]]:
    """Return the index of shards, and what is wrong with those that cannot be read, by address.

    With a `limit`, no more shards are read than have so many samples. What is missing of the index
    is made and kept in `folder`; several processes share that work. Raises DataError where no shard
    can be used.
    """
    with explain_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
    broken: dict[str, str] = {}
    parts: dict[Path, StoredFile] = {}
    count = 0
    for some in [shards] if limit is None else [[shard] for shard in shards]:
        if limit is not None and count >= limit:
            break
        broken |= _make_parts(some, folder, progress)
        parts |= {_part(folder, one): one for one in some if one.address not in broken}
        count = sum(len(columns["texts"]) for columns in Stored(list(parts))) if limit else 0
    if not parts:
        more = f" ({len(broken) - 1} more cannot be used)" if len(broken) > 1 else ""
        raise DataError(f"{next(iter(broken.values()))}{more}")
    digest = sha256("\n".join(part.stem for part in parts).encode()).hexdigest()[:32]
    path = folder / f"all-{digest}.index"
    if not _usable(path):
        _join(list(parts), path)
    return TarIndex(path, list(parts.values())), broken


def _part(folder: Path, shard: StoredFile) -> Path:
    """Return the file of a shard's own index: by its address, size and time."""
    facts = json.dumps([_VERSION, shard.address, shard.size, shard.stamp])
    return folder / f"{sha256(facts.encode()).hexdigest()[:32]}.index"


def _make_parts(shards: Sequence[StoredFile], folder: Path, progress: Progress) -> dict[str, str]:
    """Index the shards that are not indexed yet; return what is wrong with broken ones."""
    broken: dict[str, str] = {}
    done = 0
    left = [shard for shard in shards if not _usable(_part(folder, shard))]
    elsewhere = any(is_elsewhere(shard.address) for shard in left)
    with ThreadPoolExecutor(_AT_ONCE if elsewhere else 1, thread_name_prefix="shards") as pool:
        while left:
            others = []  # that another process indexes
            outcomes = pool.map(lambda shard: _make_part(shard, folder), left)
            for shard, fault in zip(left, outcomes, strict=True):
                if fault is None:
                    others.append(shard)
                elif fault:
                    broken[shard.address] = fault
                done += fault is not None
                progress(done, len(shards), "shards indexed")
            if len(others) == len(left):
                time.sleep(_PAUSE)
            left = others
    return broken


def _make_part(shard: StoredFile, folder: Path) -> str | None:
    """Index a shard; return what is wrong with it, or "". None where another process is at it."""
    from filelock import FileLock, Timeout

    path = _part(folder, shard)
    if _usable(path):
        return ""
    name = path.with_suffix(".lock")
    with explain_write(name):
        try:
            lock = FileLock(name).acquire(blocking=False)
        except Timeout:
            return None
    with lock:
        if not _usable(path):
            try:
                _write_part(shard, path)
            except UnreadFile:  # a network's fault must not pass for the shard's
                raise
            except DataError as error:
                return str(error)
            finally:
                with suppress(OSError):
                    name.unlink()
    return ""


def _usable(path: Path) -> bool:
    try:
        columns = Columns.open(path)
        return {name: columns[name].ndim for name in columns} == _COLUMNS
    except (OSError, ValueError):  # not there, or not what we wrote
        return False


def _write_part(shard: StoredFile, path: Path) -> None:
    texts, images, image_ends, name_ends = (array("q") for _ in range(4))
    names, unusable, faults = bytearray(), bytearray(), list[str]()
    for group in read_groups(shard):
        usable = True
        try:
            extension = _check(group, shard)
        except UnreadFile:
            raise
        except DataError as error:
            usable = False
            if len(faults) < _KEPT:
                faults.append(str(error))
            extension = next(iter(group.spans))
        for span in group.images.values():
            images.extend(span)
        names += json.dumps([group.key, extension, *group.images]).encode()
        texts.extend(group.spans[extension])
        image_ends.append(len(images) // 2)
        name_ends.append(len(names))
        unusable.append(not usable)
    columns = {
        "texts": np.asarray(texts).reshape(-1, 2),
        "image_ends": np.asarray(image_ends),
        "name_ends": np.asarray(name_ends),
        "unusable": np.frombuffer(unusable, np.uint8),
        "images": np.asarray(images).reshape(-1, 2),
        "shard_ends": np.asarray([len(name_ends)]),
        "names": np.frombuffer(names, np.uint8),
    }
    facts = {"shard": shard.address, "faults": faults}
    write_columns(path, [Columns(columns, facts)], facts)


def _check(group: Group, shard: StoredFile) -> str:
    """Return the extension of the member that says what a sample is. Raises DataError."""
    where = f"key `{group.key:.200}` of {shard.address}"
    if group.fault:
        raise DataError(f"{where}: {group.fault}")
    extension = choose_text(group, shard)
    images = images_of(group, shard)
    reader, row = read_row(group.key, extension, group.texts[extension], images, shard, ("?",))
    sample = reader.sample(row, 0)
    whole = [images[extension] for extension in group.whole]
    for image in sample.images:
        if image not in whole:
            check_image(image, f"sample `{sample.id:.200}`")
    return extension


def images_of(group: Group, shard: StoredFile) -> dict[str, TarImage]:
    """Return the images and videos of a group, by extension."""
    return {
        extension: TarImage(shard, f"{group.key}.{extension}", *span)
        for extension, span in group.images.items()
    }


def _join(parts: Sequence[Path], path: Path) -> None:
    """Write the indices of shards as one, piece by piece: together they may exceed the memory."""
    faults: list[str] = []
    for columns in Stored(parts):
        faults += columns.facts["faults"][: max(0, _KEPT - len(faults))]
    own = path.with_suffix(f".{token_hex(4)}")  # two processes may write it: each its own
    write_columns(own, Stored(parts), {"shards": len(parts), "faults": faults})
    with explain_write(path):
        own.replace(path)
