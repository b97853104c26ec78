"""Tar shards as webdataset writes them, read at random: order, packing and resume stay exact."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llavakit import DataError, Options, Sample, and_more
from llavakit.contracts.data import Finding, Inspected
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.conversation_rows import attempt
from llavakit_plugins.datasets.expected import CHARACTERS_A_TOKEN, Expected
from llavakit_plugins.datasets.kept_rows import KeptRows
from llavakit_plugins.datasets.shard_rows import choose_text, read_row
from llavakit_plugins.datasets.stored_files import StoredFile, find_files, is_elsewhere
from llavakit_plugins.datasets.tar_index import images_of, index_folder, open_index
from llavakit_plugins.datasets.tar_shards import Group, read_groups

_NAMED = 3
_LOOKED_AT = 8  # shards that a plan reads to learn how many samples all have
_SKIP = 'set unusable = "skip" to leave such samples and shards out'


class WebDatasetOptions(Options):
    path: str | tuple[str, ...]
    """The shards: a file or an address that fsspec reads (`s3://`, `https://`), or several; with
    braces, `shard-{000000..000123}.tar`, or stars."""
    storage: dict[str, Any] = Field(default_factory=dict)
    """What fsspec is told about the storage, such as `{ anon = true }`; keys belong in the
    environment."""
    index: Path | None = None
    """The folder for indices of shards; by default one in the user's cache folder. Where several
    machines train, one that they share saves work."""
    questions: tuple[str, ...] = Field(default=("Describe the image briefly.",), min_length=1)
    """What captions answer; each has one of them, always the same."""
    kind: str = ""
    """The kind of responses in it, for losses by kind."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many samples from the start."""
    unusable: Literal["refuse", "skip"] = "refuse"
    """What to do with samples and shards that cannot be used: refuse the data, or skip and name
    them."""
    expect: Expected | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the shards, as they are stated."""
        return (self.path,) if isinstance(self.path, str) else self.path


class WebDataset(KeptRows):
    """Samples of an image or a video (`jpg`, `png`, `mp4`, ...) and `json` or `txt` of its key.

    JSON is a row of LLaVA's, or one with `messages`; it may also be metadata, with the caption in
    it or in `txt`. Shards are indexed once, by size and time; texts and images are read when they
    are asked for. Raises DataError, naming shard and member, for what cannot be used.
    """

    name = "webdataset"
    Options = WebDatasetOptions

    def __init__(
        self, options: WebDatasetOptions, progress: Progress = lambda *_, **__: None
    ) -> None:
        self.options = options
        shards = find_files(options.names, options.storage)
        folder = options.index or index_folder()
        self._index, self._broken = open_index(shards, folder, progress, options.limit)
        self._rows = range(min(len(self._index), options.limit or len(self._index)))
        unusable = self._index.unusable
        unusable = unusable[unusable < len(self._rows)]
        if options.unusable == "refuse" and (self._broken or len(unusable)):
            faults = [*self._broken.values(), *self._index.faults]
            more = len(self._broken) + len(unusable) - 1
            raise DataError(
                faults[0] + f" ({more:,} more cannot be used)" * (more > 0) + f"; or {_SKIP}"
            )
        self._out = len(unusable)
        if len(unusable):
            self._leave_out(frozenset(unusable.tolist()))

    def __getitem__(self, index: int) -> Sample:
        number = self._number(index)
        entry, options = self._index[number], self.options
        content = entry.shard.read(*entry.text)
        reader, row = read_row(
            entry.key, entry.extension, content, entry.images, entry.shard,
            options.questions, options.kind,
        )  # fmt: skip
        return reader.sample(row, number)

    def notes(self) -> list[str]:
        found = []
        if self._broken:
            found.append(
                f"{len(self._broken)} shard{'s are' if len(self._broken) > 1 else ' is'} left out: "
                f"{and_more(list(self._broken.values()), _NAMED)}"
            )
        if self._out:
            found.append(
                f"{and_more(self.options.names, 1)}: {self._out} of {len(self._rows)} samples are "
                f"left out, such as: {and_more(self._index.faults, _NAMED)}"
            )
        return found

    @classmethod
    def expect(cls, options: WebDatasetOptions) -> tuple[int, int] | None:
        if any(map(is_elsewhere, options.names)):  # a plan fetches nothing
            return options.expect.upto(options.limit) if options.expect else None
        try:
            shards = find_files(options.names, options.storage)
        except DataError:  # not there yet
            return options.expect.upto(options.limit) if options.expect else None
        looked_at = shards[:_LOOKED_AT]
        folder = options.index or index_folder()
        index, _ = open_index(looked_at, folder, lambda *_, **__: None, options.limit)
        share = sum(shard.size for shard in shards) / sum(shard.size for shard in looked_at)
        count = round((len(index) - len(index.unusable)) * share)
        mean = float(index.text_bytes.mean()) / CHARACTERS_A_TOKEN
        return min(count, options.limit or count), max(1, round(mean))

    @classmethod
    def inspect(cls, options: WebDatasetOptions) -> Iterator[Inspected]:
        shards = find_files(options.names, options.storage)
        return islice(_inspected(options, shards), options.limit)


def _inspected(options: WebDatasetOptions, shards: list[StoredFile]) -> Iterator[Inspected]:
    whole, before = max(1, sum(shard.size for shard in shards)), 0
    for shard in shards:
        try:
            for group in read_groups(shard):
                at = max(span.start + span.length for span in group.spans.values())
                yield _inspect(group, shard, options, min(1.0, (before + at) / whole))
        except DataError as error:
            yield Inspected(shard.name, None, (Finding("shards", str(error)),))
        before += shard.size


def _inspect(group: Group, shard: StoredFile, options: WebDatasetOptions, read: float) -> Inspected:
    images = images_of(group, shard)
    key = f"{shard.name}/{group.key}"
    if group.fault:
        fault = f"key `{group.key:.200}` of {shard.address}: {group.fault}"
        return Inspected(key, None, (Finding("members", fault),), (), read)

    def choose() -> Any:
        extension = choose_text(group, shard)
        content = group.texts[extension]
        return read_row(
            group.key, extension, content, images, shard, options.questions, options.kind
        )

    found = attempt(choose, "members")
    if isinstance(found, Finding):
        return Inspected(key, None, (found,), tuple(images.values()), read)
    reader, row = found
    sample, problems, shown = reader.inspect(row, 0)
    return Inspected(row["id"], sample, tuple(problems), shown, read)
