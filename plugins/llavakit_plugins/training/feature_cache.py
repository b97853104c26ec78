"""Features of a frozen encoder on the disk, shared by processes, steps and runs.

    DIR/KEY/features-*.safetensors    features, and of which content of an image each is
    DIR/contents-*.safetensors        the content of a file, by its path, size and time

KEY stands for the encoder's weights and options, the preparation and the tiling. Files are only
added, each whole or not at all, so any number of runs may use one folder at once. Features have the
type that the encoder gives: rounded, they would not train the same model.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from llavakit import LlavaModel, PackedBatch, Run, VisionEncoder, explain_write
from llavakit.contracts.data import ImageFile, ImageSource
from llavakit.contracts.packing import upload
from llavakit_plugins.datasets.columns import Column, Columns, write_columns
from llavakit_plugins.training.agreement import in_each
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.corpus_key import facts_of
from llavakit_plugins.training.encoding import Image, distinct_images, encode_images

_FILE_BYTES = 256 << 20  # of features in one file: what a kill loses at most
_NONE = bytes(16)  # the content of what is no file
_READ = ("source", "revision", "dtype")  # options that say where the weights are

_log = logging.getLogger("llavakit")


def encoder_key(
    model: LlavaModel, preparing: VisionEncoder, changes: Mapping[str, Any], dtype: torch.dtype
) -> str:
    """Return the same text for encoders that give the same features of the same images.

    `changes` are those of the options with which `preparing` prepares images.
    """
    views = model.views
    stated = {**model.choices["vision"], **changes}
    stated.pop("use")
    # the same for weights from the hub and for the model folder that holds them now
    options = preparing.Options.model_validate(stated).alone().model_dump(mode="json")
    facts = [
        [type(preparing).__module__, type(preparing).__qualname__],
        {name: value for name, value in options.items() if name not in _READ},
        None if views.tiling is None else facts_of(views.tiling),
        [*views.view, views.upright],
        # one kind of device rounds otherwise than another
        [str(dtype), model.device.type],
    ]
    found = blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12)
    for name, weight in sorted(model.vision.state_dict().items()):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


class FeatureFiles:
    """Features of one encoder: of each content of an image, the rows of its views."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Columns] = []
        self.load()

    def load(self) -> None:
        """Look at the folder again: others add to it."""
        self._files = list(_files(self.folder, "features", _check_features))
        keys = [file["contents"] for file in self._files]
        self._keys: Column = np.concatenate([np.zeros((0, 2), "<u8"), *keys])
        self._begins = np.cumsum([0, *map(len, keys)])

    @property
    def bytes(self) -> int:
        return sum(file["features"].nbytes for file in self._files)

    def find(self, contents: Column) -> Column:
        """Return the number of each image here, or -1; `contents` is `[I, 2]`."""
        return positions(self._keys, contents)

    def read(self, number: int) -> Tensor | None:
        """Return the features `[views, P, D]` of an image; None where they are damaged."""
        at = int(np.searchsorted(self._begins, number, side="right")) - 1
        file, own = self._files[at], number - int(self._begins[at])
        ends = file["row_ends"]
        rows = np.array(file["features"][int(ends[own - 1]) if own else 0 : int(ends[own])])
        if zlib.crc32(rows.data) != file["sums"][own]:
            return None
        dtype = getattr(torch, file.facts["dtype"])
        return torch.from_numpy(rows).view(dtype).reshape(-1, *file.facts["shape"])

    def drop(self, number: int) -> None:
        """Remove the file that holds an image's features: it is damaged."""
        at = int(np.searchsorted(self._begins, number, side="right")) - 1
        _remove(self._files[at].path, "its features are not what was written")

    def write(self, contents: Column, views: Sequence[int], features: Tensor) -> None:
        """Add a file of the features `[V, P, D]` of images with so many views each."""
        rows = features.contiguous().flatten(1).view(torch.uint8).numpy()
        ends = np.cumsum(np.asarray(views, np.int64))
        parts = np.split(rows, ends[:-1])
        sums = np.asarray([zlib.crc32(np.ascontiguousarray(part).data) for part in parts], np.int64)
        facts = {"shape": list(features.shape[1:]), "dtype": str(features.dtype).split(".")[-1]}
        columns = {"contents": contents, "row_ends": ends, "sums": sums, "features": rows}
        _add(self.folder, "features", Columns(columns, facts))


class Kept:
    """Takes features from the disk; what is not there is encoded once, each process its share.

    No more than `most` bytes of one encoder are kept: other images are encoded when they are due.
    """

    def __init__(
        self,
        corpus: Corpus,
        model: LlavaModel,
        *,
        dtype: torch.dtype,
        run: Run,
        folder: Path,
        most: int,
        preparing: VisionEncoder,
        changes: Mapping[str, Any],
        processes: int = 1,
    ) -> None:
        self._corpus, self._model, self._dtype = corpus, model, dtype
        self._preparing, self._processes = preparing, processes
        group = run.process_group
        self._images = in_each(group, lambda: distinct_images(corpus))
        distinct, first_views = self._images.distinct, self._images.first_views
        contents = _contents(corpus, distinct, folder, run)

        def look() -> Column:
            self._files = FeatureFiles(folder / encoder_key(model, preparing, changes, dtype))
            return self._files.find(contents)

        found = in_each(group, look)  # none begins to write before all have looked
        # each content once, in the order in which images are shown
        _, first = np.unique(contents, axis=0, return_index=True)
        missing = np.sort(first[(found[first] < 0) & contents[first].any(axis=1)])
        views = np.diff(first_views)
        room = most - self._files.bytes
        if len(missing):
            view = model.vision.tokens(model.vision.image_size) * model.vision.width
            needed = np.cumsum(views[missing]) * view * dtype.itemsize
            fits = int(np.searchsorted(needed, room, side="right"))
            if fits < len(missing) and group.is_main:
                _log.warning(
                    "note: the features of %s images need %.3g GB more than `feature_cache_gb` "
                    "leaves in %s: these are encoded each time they are due", f"{len(missing):,}",
                    (needed[-1] - max(0, room)) / 1e9, folder,
                )  # fmt: skip
            missing = missing[:fits]
        share = np.array_split(missing, group.size)[group.rank]

        def progress(done: int, total: int, note: str) -> None:
            run.progress(min(done * group.size, len(missing)), len(missing), note)

        # all wait here until the last is done
        in_each(group, lambda: self._encode(share, contents, views, progress))
        self._files.load()
        self._where = self._files.find(contents)

    def load(self, micros: Iterable[Sequence[int]]) -> Generator[tuple[PackedBatch, Tensor | None]]:
        for samples in micros:
            batch = self._corpus.pack(samples)
            features = None
            if batch.images:
                found = [self._read(*image) for image in batch.images]
                features = upload(torch.cat(found), self._model.device)
            yield batch.to(self._model.device), features

    def _read(self, sample: int, image: int) -> Tensor:
        number = self._images.number(sample, image)
        place = int(self._where[number])
        if place >= 0:
            features = self._files.read(place)
            if features is not None:
                return features
            self._files.drop(place)
            self._where[number] = -1
        images = [(sample, image)]
        return torch.cat(list(self._encoded(images, lambda *_: None, 1))).cpu()

    def _encoded(
        self,
        images: Sequence[Image],
        progress: Callable[[int, int, str], None],
        processes: int,
    ) -> Iterator[Tensor]:
        return encode_images(
            self._corpus, self._model, images, self._dtype, progress, self._preparing, processes
        )

    def _encode(
        self,
        numbers: Column,
        contents: Column,
        views: Column,
        progress: Callable[[int, int, str], None],
    ) -> None:
        """Encode images of these numbers, and write them, a file full at a time."""
        images = [self._images.distinct[number] for number in numbers.tolist()]
        waiting: list[Tensor] = []
        written = 0
        ends = np.cumsum(views[numbers])
        done = size = 0
        for features in self._encoded(images, progress, self._processes):
            waiting.append(features.cpu())
            done += len(features)
            size += features.nbytes
            whole = int(np.searchsorted(ends, done, side="right"))
            if size < _FILE_BYTES and whole < len(images):
                continue
            if whole == written:  # the views of one image are not all there
                continue
            rows = torch.cat(waiting)
            own = int(ends[whole - 1] - (ends[written - 1] if written else 0))
            part = numbers[written:whole]
            self._files.write(contents[part], views[part].tolist(), rows[:own])
            waiting, written = [rows[own:]], whole
            size = waiting[0].nbytes


def positions(keys: Column, wanted: Column) -> Column:
    """Return where each of `wanted` `[M, 2]` lies among `keys` `[K, 2]`, or -1."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys[:, 0], kind="stable")
    at = np.searchsorted(keys[order, 0], wanted[:, 0]).clip(max=len(keys) - 1)
    found: Column = order[at]
    return np.where((keys[found] == wanted).all(axis=1), found, -1)


def _contents(corpus: Corpus, images: Sequence[Image], folder: Path, run: Run) -> Column:
    """Return what tells the content of each image, `[I, 2]`; zeros for what is no file.

    A file is read for it once, and then known by its path, size and time. Each process reads its
    share of those that are not known.
    """
    group = run.process_group

    def look() -> tuple[Column, Column]:
        names = _digests(_name(corpus, image) for image in images)
        return names, np.flatnonzero(positions(_known(folder)[0], names) < 0)

    def read() -> None:
        contents = _digests(_content(corpus, images[number]) for number in mine.tolist())
        if len(mine):
            _add(folder, "contents", Columns({"names": names[mine], "contents": contents}, {}))

    # none begins to write before all have looked: else shares leave gaps
    names, missing = in_each(group, look)
    mine = missing[group.rank :: group.size]
    in_each(group, read)
    known, contents = _known(folder)
    found = positions(known, names)
    # one that a slow file system does not show yet is encoded when it is due
    seen = found >= 0
    result: Column = np.zeros((len(names), 2), "<u8")
    result[seen] = contents[found[seen]]
    return result


def _known(folder: Path) -> tuple[Column, Column]:
    files = list(_files(folder, "contents", _check_contents))
    empty: Column = np.zeros((0, 2), "<u8")
    names = np.concatenate([empty, *(file["names"] for file in files)])
    return names, np.concatenate([empty, *(file["contents"] for file in files)])


def _name(corpus: Corpus, image: Image) -> bytes:
    source, seen = _source(corpus, image)
    stamp = getattr(source, "stamp", "")  # of a file that holds it
    if isinstance(source, Path):
        with suppress(OSError):
            state = source.stat()
            stamp = f"{state.st_size} {state.st_mtime_ns}"
        source = Path(os.path.abspath(source))
    if not isinstance(source, ImageFile):
        return _content(corpus, image)
    return _digest(f"{source} {stamp} {seen}".encode("utf-8", "surrogatepass"))


def _content(corpus: Corpus, image: Image) -> bytes:
    source, seen = _source(corpus, image)
    if isinstance(source, ImageFile):
        try:
            source = source.read_bytes()
        except OSError:  # who opens it says what is wrong, and of which sample
            return _NONE
    return _digest(source, seen.encode()) if isinstance(source, bytes) else _NONE


def _source(corpus: Corpus, image: Image) -> tuple[ImageSource, str]:
    """Return an image, and what its views depend on beside its content."""
    sample, number = image
    shown = corpus.shown(sample)
    return corpus.images[sample][number], repr(shown[number]) if shown else ""


def _digest(*parts: bytes) -> bytes:
    found = blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.digest()


def _digests(found: Iterable[bytes]) -> Column:
    return np.frombuffer(b"".join(found), "<u8").reshape(-1, 2)


def _add(folder: Path, kind: str, columns: Columns) -> None:
    with explain_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_columns(folder / f"{kind}-{uuid4().hex[:16]}.safetensors", [columns], columns.facts)


def _files(folder: Path, kind: str, check: Callable[[Columns], None]) -> Iterator[Columns]:
    """Yield the files of one kind; one that is damaged is removed, and that is said."""
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        try:
            columns = Columns.open(path)
            check(columns)
        except FileNotFoundError:  # another run has removed it
            continue
        except (ValueError, KeyError, TypeError, OSError) as error:
            _remove(path, str(error))
            continue
        yield columns


def _check_features(columns: Columns) -> None:
    count, rows = len(columns["contents"]), len(columns["features"])
    ends, dtype = columns["row_ends"], getattr(torch, str(columns.facts["dtype"]), None)
    if not isinstance(dtype, torch.dtype) or not len(ends) == len(columns["sums"]) == count > 0:
        raise ValueError("it says something else than what is written there")
    if ends[-1] != rows or ends[0] < 0 or (np.diff(ends) < 0).any():
        raise ValueError("its rows do not count up to what is there")
    shape = columns.facts["shape"]
    if columns["contents"].shape[1:] != (2,) or len(shape) != 2:
        raise ValueError("its columns are of another shape")
    if columns["features"].shape[1:] != (shape[0] * shape[1] * dtype.itemsize,):
        raise ValueError("its rows are of another size")


def _check_contents(columns: Columns) -> None:
    if not columns["names"].shape == columns["contents"].shape == (len(columns["names"]), 2):
        raise ValueError("its columns are of another shape")


def _remove(path: Path | None, reason: str) -> None:
    _log.warning("note: %s is damaged (%s): its images are encoded again", path, reason)
    if path is not None:
        with suppress(OSError):
            path.unlink()
