"""Renders and tokenises the rows of a data set, a block of them at a time, into columns.

N samples, I uses of images.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llavakit import Dataset, Encoder, PromptTemplate, Sample, Views
from llavakit_plugins.datasets.columns import Column, Columns, joined
from llavakit_plugins.training.image_paths import identity_of, name_of
from llavakit_plugins.training.records import Records

MOST, _LEAST = 1 << 14, 1 << 11  # samples of a block: from a tenth of a second to seconds of work
_SHOWN_EVERY = 256
_AT_ONCE = 32  # samples, which may hold an image each

Shows = Callable[[int], None]
"""Is told how many samples of a block are done."""


class Reading(NamedTuple):
    """What makes rows of the stream of a data set's rows."""

    data: Dataset
    template: PromptTemplate
    tokenizer: Any
    views: Views
    max_length: int

    @property
    def token_type(self) -> str:
        """How ids are stored; negative numbers stand for images."""
        return "<i2" if len(self.tokenizer) < 1 << 15 else "<i4"

    def block(self, begin: int, end: int, shows: Shows = lambda done: None) -> Columns:
        """Return the samples from `begin` to `end`. Raises DataError as `encode` does."""
        # arrays, not lists: a Python number takes 32 bytes
        names, ids, identities = bytearray(), bytearray(), bytearray()
        name_ends, id_ends, image_ends, sizes = array("q"), array("q"), array("q"), array("i")
        encoder = Encoder(self.template, self.tokenizer)
        records = Records(np.dtype(self.token_type), self.max_length)
        paths = True
        views = 0
        plain = self.views.view.tokens
        for number, sample in enumerate(self._samples(begin, end), start=begin):
            encoder.read(sample, records.tokens)
            shown = self.views.shown(sample.images, f"sample `{sample.id}`")
            for one in shown:
                placed = self.views.of(one)
                views += placed.views
                records.images.append(len(placed.index_RK))
                sizes.extend((one.width, one.height, one.frames))
            if not shown:
                records.images.extend([plain] * len(sample.images))
            records.end()
            ids += sample.id.encode("utf-8", "surrogatepass")
            id_ends.append(len(ids))
            for at, image in enumerate(sample.images):
                name = name_of(image)
                paths &= bool(name)
                names += name
                name_ends.append(len(names))
                seen = shown[at] if shown else None
                identities += identity_of(image, (number, at), seen)
            image_ends.append(len(name_ends))
            if (number - begin) % _SHOWN_EVERY == _SHOWN_EVERY - 1:
                records.write()
                shows(number + 1 - begin)
        records.write()
        shows(end - begin)
        columns: dict[str, Column] = {
            "records": np.frombuffer(bytes(records.written), np.uint8),
            "names": np.frombuffer(bytes(names), np.uint8),
            "ids": np.frombuffer(bytes(ids), np.uint8),
            "identities": np.frombuffer(bytes(identities), "<u8").reshape(-1, 2),
            "lengths": np.asarray(records.lengths),
            "supervised": np.asarray(records.supervised),
            "sizes": np.asarray(sizes).reshape(-1, 3),
            "record_ends": np.asarray(records.ends),
            "image_ends": np.asarray(image_ends),
            "name_ends": np.asarray(name_ends),
            "id_ends": np.asarray(id_ends),
        }
        facts = {"token_type": self.token_type, "samples": end - begin, "cut": records.cut}
        return Columns(columns, {**facts, "views": views, "paths": paths})

    def _samples(self, begin: int, end: int) -> Iterator[Sample]:
        """Yield samples, of which a few are read ahead: to do one thing several times is faster, by
        a fifth, as the processor's caches hold one thing at a time."""
        for first in range(begin, end, _AT_ONCE):
            yield from [self.data[at] for at in range(first, min(first + _AT_ONCE, end))]

    def facts(self, blocks: Sequence[Columns]) -> dict[str, Any]:
        """Return what is known of all samples together."""
        return {**self.counts(blocks), "notes": list(self.data.notes())}

    def counts(self, blocks: Sequence[Columns]) -> dict[str, Any]:
        """Return what the facts of these blocks come to, as if they were one."""
        every = [block.facts for block in blocks]
        sums = {name: sum(facts[name] for facts in every) for name in ("samples", "cut", "views")}
        return {
            "token_type": self.token_type,
            **sums,
            "paths": all(facts["paths"] for facts in every),  # whether all images are paths
        }


def blocks_of(samples: int) -> list[range]:
    """Return the blocks of so many samples: the same for any number of processes."""
    size = min(MOST, max(_LEAST, -(-samples // 64)))
    return [range(begin, min(begin + size, samples)) for begin in range(0, samples, size)]


def read_all(reading: Reading, progress: Callable[[int, int], None]) -> Columns:
    """Return all samples in memory."""
    total = len(reading.data)
    blocks = []
    for block in blocks_of(total):

        def shows(done: int, begin: int = block.start) -> None:
            progress(begin + done, total)

        blocks.append(reading.block(block.start, block.stop, shows))
    return joined(blocks, reading.facts(blocks))


def check(columns: Columns) -> None:
    """Raise ValueError for columns that do not fit together."""
    samples, kind = columns.facts["samples"], np.dtype(columns.facts["token_type"])
    if kind not in (np.dtype("<i2"), np.dtype("<i4")) or columns.facts["views"] < 0:
        raise ValueError("it says something else than what is written there")
    for name in ("lengths", "supervised", "record_ends", "image_ends", "id_ends"):
        if len(columns[name]) != samples:
            raise ValueError(f"`{name}` has {len(columns[name])} rows for {samples} samples")
    uses = len(columns["name_ends"])
    held = {"record": "records", "id": "ids", "name": "names"}
    lasts = {of: len(columns[name]) for of, name in held.items()} | {"image": uses}
    for of, last in lasts.items():
        ends = columns[f"{of}_ends"]
        if (int(ends[-1]) if len(ends) else 0) != last or not ascending(ends):
            raise ValueError(f"`{of}_ends` does not count up to what is there")
    if len(columns["identities"]) != uses or len(columns["sizes"]) not in (0, uses):
        raise ValueError("its images are not all there")


def ascending(ends: Column) -> bool:
    """Say whether a column counts up from 0 or more, looking at a part of it at a time."""
    last = 0
    for begin in range(0, len(ends), 1 << 20):
        part = ends[begin : begin + (1 << 20)]
        if part[0] < last or (np.diff(part) < 0).any():
            return False
        last = part[-1]
    return True
