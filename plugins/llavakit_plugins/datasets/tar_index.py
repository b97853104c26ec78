"""Where each sample of tar shards lies: found once, kept in a file that all processes map.

N samples, I images, S shards.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llavakit import DataError, explain_write
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.array_files import Pieces, map_arrays, write_arrays
from llavakit_plugins.datasets.image_files import check_image
from llavakit_plugins.datasets.shard_rows import choose_text, read_row
from llavakit_plugins.datasets.stored_files import StoredFile, UnreadFile, is_elsewhere
from llavakit_plugins.datasets.tar_shards import Group, Span, TarImage, read_groups

_VERSION = 1  # of the index, and of what is checked when it is made
_KEPT = 20  # sentences about samples of one shard
_AT_ONCE = 8  # shards that come over a network
_PAUSE = 0.1  # seconds between looks at what another process indexes

Arrays = Mapping[str, npt.NDArray[Any]]


class Entry(NamedTuple):
    """Where a sample lies."""

    shard: StoredFile
    key: str
    extension: str
    """Of the member that says what the sample is."""
    text: Span
    images: Mapping[str, TarImage]
    """By extension."""


class TarIndex:
    """The samples of shards, in the shards' order. Can be pickled: processes map the same file."""

    def __init__(self, path: Path, shards: Sequence[StoredFile]) -> None:
        self.path, self.shards = path, shards
        self._arrays, metadata = map_arrays(self.path)
        self.faults: list[str] = json.loads(metadata["faults"])
        """What is wrong with the first samples that cannot be used."""
        # read at each access: as ordinary arrays, since numpy's mapped ones are slow to index
        self._samples_N4 = self._arrays["samples"].view(np.ndarray)
        self._images_I2 = self._arrays["images"].view(np.ndarray)
        self._ends_S = self._arrays["shards"].tolist()

    @property
    def unusable(self) -> npt.NDArray[np.int64]:
        """The numbers of samples that cannot be used, ascending."""
        return self._arrays["unusable"]

    @property
    def text_bytes(self) -> npt.NDArray[np.int64]:
        """How many bytes say what each sample is."""
        return self._samples_N4[:, 1]

    def __len__(self) -> int:
        return len(self._samples_N4)

    def __getitem__(self, number: int) -> Entry:
        start, length, images_end, name_end = self._samples_N4[number].tolist()
        image, name = self._samples_N4[number - 1, 2:].tolist() if number else (0, 0)
        shard = self.shards[bisect_right(self._ends_S, number)]
        key, extension, *extensions = json.loads(self._arrays["names"][name:name_end].tobytes())
        spans = self._images_I2[image:images_end].tolist()
        images = {
            found: TarImage(shard, f"{key}.{found}", *span)
            for found, span in zip(extensions, spans, strict=True)
        }
        return Entry(shard, key, extension, Span(start, length), images)

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
        count = sum(len(map_arrays(part)[0]["samples"]) for part in parts) if limit else 0
    if not parts:
        more = f" ({len(broken) - 1} more cannot be used)" if len(broken) > 1 else ""
        raise DataError(f"{next(iter(broken.values()))}{more}")
    digest = sha256("\n".join(part.stem for part in parts).encode()).hexdigest()[:32]
    path = folder / f"all-{digest}.index"
    if not _usable(path):
        _join(list(parts), path)  # two processes may: each writes the same, whole
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
        arrays, _ = map_arrays(path)
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not what we wrote
        return False
    return arrays.keys() == {"samples", "images", "shards", "unusable", "names"}


def _write_part(shard: StoredFile, path: Path) -> None:
    samples, images, unusable = array("q"), array("q"), array("q")
    names, faults = bytearray(), list[str]()
    for number, group in enumerate(read_groups(shard)):
        try:
            extension = _check(group, shard)
        except UnreadFile:
            raise
        except DataError as error:
            unusable.append(number)
            if len(faults) < _KEPT:
                faults.append(str(error))
            extension = next(iter(group.spans))
        for span in group.images.values():
            images.extend(span)
        names += json.dumps([group.key, extension, *group.images]).encode()
        samples.extend((*group.spans[extension], len(images) // 2, len(names)))
    found: dict[str, npt.NDArray[Any]] = {
        "samples": np.asarray(samples).reshape(-1, 4),
        "images": np.asarray(images).reshape(-1, 2),
        "shards": np.asarray([len(samples) // 4]),
        "unusable": np.asarray(unusable),
        "names": np.frombuffer(names, np.uint8),
    }
    arrays = {name: Pieces(a.dtype, a.shape, [a]) for name, a in found.items()}
    write_arrays(path, arrays, {"shard": shard.address, "faults": json.dumps(faults)})


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
    """Return the images of a group, by extension."""
    return {
        extension: TarImage(shard, f"{group.key}.{extension}", *span)
        for extension, span in group.images.items()
    }


def _join(parts: Sequence[Path], path: Path) -> None:
    """Write the indices of shards as one, piece by piece: together they may exceed the memory."""
    totals = dict.fromkeys(("samples", "images", "unusable", "names"), 0)
    faults: list[str] = []
    for part in parts:
        arrays, metadata = map_arrays(part)
        for name in totals:
            totals[name] += len(arrays[name])
        faults += json.loads(metadata["faults"])[: max(0, _KEPT - len(faults))]

    def pieces(name: str, *counted: str) -> Iterator[npt.NDArray[Any]]:
        """Yield an array of each part; its last columns count what the parts before have."""
        before = np.zeros(len(counted), np.int64)
        for part in parts:
            arrays, _ = map_arrays(part)
            piece = arrays[name]
            if counted:
                piece = np.array(piece)
                columns = piece if piece.ndim == 2 else piece[:, None]
                columns[:, -len(counted) :] += before
                before += [len(arrays[other]) for other in counted]
            yield piece

    ends = np.cumsum([len(map_arrays(part)[0]["samples"]) for part in parts])
    write_arrays(
        path,
        {
            "samples": Pieces(
                np.int64, (totals["samples"], 4), pieces("samples", "images", "names")
            ),
            "images": Pieces(np.int64, (totals["images"], 2), pieces("images")),
            "shards": Pieces(np.int64, ends.shape, [ends]),
            "unusable": Pieces(np.int64, (totals["unusable"],), pieces("unusable", "samples")),
            "names": Pieces(np.uint8, (totals["names"],), pieces("names")),
        },
        {"shards": str(len(parts)), "faults": json.dumps(faults)},
    )
