"""Data sets of Hugging Face's package `datasets`: parquet, Arrow, saved folders, names on the hub.

Images may be inside: their bytes stay undecoded until an image is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from llavakit import DataError, InputPath, Options, Sample, and_more
from llavakit.contracts.data import Inspected
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.conversation_rows import RowReader
from llavakit_plugins.datasets.expected import CHARACTERS_A_TOKEN, Expected
from llavakit_plugins.datasets.image_files import check_image
from llavakit_plugins.datasets.kept_rows import KeptRows
from llavakit_plugins.datasets.preferences import KEYS
from llavakit_plugins.datasets.stored_files import find_files, is_elsewhere, is_pattern

COLUMNS = ("id", "image", "images", "video", "videos", "conversations", "messages", "system", *KEYS)
"""What is read of a row; other columns are not even loaded."""

_FILES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NAMED = 3
_LOOKED_AT = 4096  # rows that a plan reads to learn how long they are
_SHOWN_EVERY = 256


class HuggingFaceOptions(Options):
    path: str
    """A parquet or Arrow file, a folder of them or one that `save_to_disk` wrote, or a name on the
    hub, such as `HuggingFaceH4/llava-instruct-mix-vsft`. Files may be named with braces and stars,
    `part-{000..011}.parquet`, and by addresses that fsspec reads, such as `s3://`."""
    storage: dict[str, Any] = Field(default_factory=dict)
    """What fsspec is told about the storage of addresses, such as `{ anon = true }`; keys belong in
    the environment."""
    subset: str | None = None
    """Which of its configurations, where it has several."""
    split: str = "train"
    """One split, or a part of it as `datasets` writes that: `train[:1000]`."""
    revision: str | None = None
    """Commit or tag on the hub."""
    images: InputPath | None = None
    """The folder of images that the rows name; by default the folder of the data."""
    kind: str = ""
    """The kind of responses in it, for losses by kind."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many samples from the start."""
    unusable: Literal["refuse", "skip"] = "refuse"
    """What to do with samples that cannot be used: refuse the data, or skip and name them."""
    expect: Expected | None = None


class HuggingFace(KeptRows):
    """Rows with `conversations` or `messages`, and images in `image` or `images`.

    A sample's images are the bytes of their files, as the data set holds them, or paths. Every row
    is looked at before training, its images' pixels are not decoded. Raises DataError for data
    that cannot be read or used.
    """

    name = "huggingface"
    Options = HuggingFaceOptions

    def __init__(
        self, options: HuggingFaceOptions, progress: Progress = lambda *_, **__: None
    ) -> None:
        self.options = options
        self._reader = _reader(options)
        self._rows = _load(options)
        self._left_out: list[str] = []
        bad: set[int] = set()
        for number in range(len(self._rows)):
            if number % _SHOWN_EVERY == 0:
                progress(number, len(self._rows), "rows looked at")
            try:
                sample = self._reader.sample(self._rows[number], number)
                for image in sample.images:
                    check_image(image, f"sample `{sample.id:.200}`")
            except DataError as error:
                if options.unusable == "refuse":
                    raise DataError(
                        f'{error}; or set unusable = "skip" to leave such samples out'
                    ) from error
                bad.add(number)
                self._left_out.append(str(error))
        if bad:
            self._leave_out(bad)

    def __getitem__(self, index: int) -> Sample:
        number = self._number(index)
        return self._reader.sample(self._rows[number], number)

    def notes(self) -> list[str]:
        if self._numbers is None:
            return []
        return [
            f"{self.options.path}: {len(self._left_out)} of {len(self._rows)} samples are left "
            f"out: {and_more(self._left_out, _NAMED)}"
        ]

    @classmethod
    def missing(cls, options: HuggingFaceOptions) -> str | None:
        try:
            import datasets  # noqa: F401
        except ImportError as error:
            return (
                "the data set `huggingface` needs `datasets`, which cannot be imported "
                f"({error!s:.300}): pip install 'llavakit[datasets]'"
            )
        return None

    @classmethod
    def expect(cls, options: HuggingFaceOptions) -> tuple[int, int] | None:
        is_here = Path(options.path).exists() or (
            is_pattern(options.path) and not is_elsewhere(options.path)
        )
        if cls.missing(options) or not is_here:  # a plan fetches nothing
            return options.expect.upto(options.limit) if options.expect else None
        rows = _load(options, images=False)
        looked_at = range(min(_LOOKED_AT, len(rows)))
        text = sum(len(str(rows[number])) for number in looked_at)
        return len(rows), max(1, round(text / CHARACTERS_A_TOKEN / max(1, len(looked_at))))

    @classmethod
    def inspect(cls, options: HuggingFaceOptions) -> Iterator[Inspected]:
        reader, rows = _reader(options), _load(options)
        for number in range(len(rows)):
            sample, problems, images = reader.inspect(rows[number], number)
            identity = reader.name(rows[number], number)[0]
            read = (number + 1) / len(rows)
            yield Inspected(identity, sample, tuple(problems), images, read)


def reader_of(path: str) -> str:
    """Return the data set that reads what a command line names: this one for parquet, Arrow, a
    folder or a name on the hub, `webdataset` for tar shards, else `conversations`."""
    found = Path(path.partition("?")[0] if is_elsewhere(path) else path)
    if found.name.lower().endswith(_SHARDS):
        return "webdataset"
    known = found.suffix.lower() in (".parquet", ".arrow") or is_elsewhere(path)
    if found.exists():
        mine = found.is_dir() or known
    else:
        mine = known or (_NAME.fullmatch(path) is not None and found.suffix.lower() not in _FILES)
    return HuggingFace.name if mine and path else "conversations"


def _reader(options: HuggingFaceOptions) -> RowReader:
    path = Path(options.path)
    folder = path if path.is_dir() else path.parent
    return RowReader(options.path, options.images or folder, options.kind)


class Rows:
    """The rows of a table of `datasets`; images as the data has them, undecoded."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._table[index]
        # a table has every column in every row; None stands for a key that the row does not have
        return {key: value for key, value in row.items() if value is not None}


def _load(options: HuggingFaceOptions, *, images: bool = True) -> Rows:
    """Return the rows. Raises DataError, with the reason, where there are none to be had."""
    if sentence := HuggingFace.missing(options):
        raise DataError(sentence)
    import datasets

    where = options.path + (f" ({options.subset})" if options.subset else "")
    with _quietly(datasets):
        try:
            table = _open(datasets, options)
        except DataError:
            raise
        except Exception as error:  # each of its readers, and of the hub's, has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"cannot read the data set {where}, split `{options.split}`: {reason:.300}; check "
                "`path`, `subset` and `split`"
            ) from error
    if not isinstance(table, datasets.Dataset):
        splits = ", ".join(map(str, table)) if isinstance(table, Mapping) else type(table).__name__
        raise DataError(f"{where} gives no single split (it has {splits}); state `split`")
    names = [name for name in COLUMNS if name in table.column_names]
    if not {"conversations", "messages", "chosen"} & set(names):
        raise DataError(
            f"{where} has no column `conversations` or `messages` (it has "
            f"{and_more(table.column_names, 12)}); rename one to that"
        )
    if not len(table):
        raise DataError(f"{where} holds no samples; choose another")
    if not images:
        names = [name for name in names if name not in ("image", "images", "video", "videos")]
    # parquet is stored by column: those that are left out are never read from the disk
    table = table.select_columns(names)
    if options.limit is not None:
        table = table.select(range(min(options.limit, len(table))))
    return Rows(_undecoded(datasets, table))


def _open(datasets: Any, options: HuggingFaceOptions) -> Any:
    path, split = Path(options.path), options.split
    if is_elsewhere(options.path) or is_pattern(options.path):
        files = [file.address for file in find_files((options.path,), options.storage)]
        kind = _kind_of_file(files[0])
        return datasets.load_dataset(
            kind, data_files=files, split=split, storage_options=options.storage or None
        )
    if path.is_dir() and any(
        (path / name).exists() for name in ("state.json", "dataset_dict.json")
    ):
        found = datasets.load_from_disk(options.path)
        if isinstance(found, Mapping):
            name, _, part = split.partition("[")
            if name not in found:
                raise DataError(f"{path} has no split `{name}`; it has {and_more(list(found), 12)}")
            found = found[name]
            split = f"train[{part}" if part else "train"
        if split == "train":
            return found
        raise DataError(f"{path} was saved whole: state `limit` in place of a part in `split`")
    if path.is_file():
        kind = _kind_of_file(options.path)
        return datasets.load_dataset(kind, data_files=options.path, split=split)
    if not path.exists() and not _NAME.fullmatch(options.path):
        raise DataError(f"{path} does not exist, and is no name on the hub (OWNER/NAME) either")
    return datasets.load_dataset(
        options.path, options.subset, split=split, revision=options.revision
    )


def _kind_of_file(name: str) -> str:
    """Return what the package calls files of this kind."""
    plain = name.partition("?")[0] if is_elsewhere(name) else name
    kind = _FILES.get(PurePosixPath(plain).suffix.lower())
    if kind is None:
        raise DataError(
            f"{name} is none of {', '.join(_FILES)}; name such a file, a folder or a name on the "
            "hub"
        )
    return kind


def _undecoded(datasets: Any, table: Any) -> Any:
    """Return a table whose images and videos, wherever they are in a row, stay bytes."""
    features = {name: _plain(datasets, kind) for name, kind in table.features.items()}
    if features == dict(table.features):
        return table
    return table.cast(datasets.Features(features))


def _plain(datasets: Any, kind: Any) -> Any:
    if isinstance(kind, datasets.Image | datasets.Video):
        return type(kind)(decode=False)
    if isinstance(kind, dict):
        return {name: _plain(datasets, inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return [_plain(datasets, inner) for inner in kind]
    if hasattr(kind, "feature"):  # a list, by any of its names
        return replace(kind, feature=_plain(datasets, kind.feature))
    return kind


@contextmanager
def _quietly(datasets: Any) -> Iterator[None]:
    """Show none of its progress bars: the run has its own."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
