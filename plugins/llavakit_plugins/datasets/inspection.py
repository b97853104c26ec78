"""Checks every sample of a data set before training, and reports all faults.

`llava-run check-data` prints the report. Rows are read one at a time; only a few numbers per sample
stay in memory.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llavakit import (
    kind_of,
    open_image,
)
from llavakit.contracts.component import Use
from llavakit.contracts.data import (
    Finding,
    ImageFile,
    ImageSource,
    Inspected,
    Sample,
    Turn,
    Video,
)
from llavakit.contracts.errors import DataError, ModelError
from llavakit.contracts.interfaces import Dataset
from llavakit_plugins.datasets.image_files import check_image, whole_images
from llavakit_plugins.datasets.inspection_report import KEPT, Report, Sort, distribution
from llavakit_plugins.datasets.lengths import Lengths
from llavakit_plugins.media import MissingImage, check_video

if TYPE_CHECKING:
    from llavakit import Registry
    from llavakit.contracts.run import Progress

_AT_ONCE = 4096  # images to look at together


def inspect_data(
    use: Use[Dataset],
    registry: Registry,
    lengths: Lengths,
    progress: Progress,
    *,
    thorough: bool = False,
) -> Report:
    """Return the report of a data set, which is read from its beginning to its end.

    With `thorough`, every image file is decoded; otherwise only its beginning and end are checked.
    """
    seen = _Seen(lengths, thorough)
    begun = time.monotonic()
    parts = _made_of(use, registry)
    for number, part in enumerate(parts):

        def advance(row: Inspected, number: int = number) -> None:
            rate = seen.rows / max(1e-9, time.monotonic() - begun)
            missing = seen.count("missing images")
            note = f", {missing:,} images missing" if missing else ""
            read = round(1000 * (number + row.read) / len(parts))
            progress(read, 1000, f"{seen.rows:,} rows, {rate:,.0f}/s{note}")

        _look(part, registry, seen, advance)
    if parts != [use] and not seen.stops:
        try:
            registry.build(use)
        except DataError as error:
            seen.find(Finding("file", str(error)))
    progress(1000, 1000, f"{seen.rows:,} rows")
    return seen.report(str(use.options.get("path", use.use)), time.monotonic() - begun)


def _made_of(use: Use[Dataset], registry: Registry) -> list[Use[Dataset]]:
    """Return the data sets that one is made of, or itself: of each, all faults are found."""
    component, options = registry.chosen(use), registry.options(use)
    if component.inspect(options) is not None:
        return [use]
    stated = (v if isinstance(v, tuple | list) else (v,) for v in vars(options).values())
    parts = [
        part
        for choice in chain.from_iterable(stated)
        if isinstance(choice, Use) and issubclass(kind_of(choice), Dataset)
        for part in _made_of(choice, registry)
    ]
    return parts or [use]


def _look(
    use: Use[Dataset], registry: Registry, seen: _Seen, advance: Callable[[Inspected], None]
) -> None:
    """Look at every row of a data set."""
    # what a training leaves out stops none: what is left is read again, as it reads it
    seen.leaves_out = use.options.get("unusable") == "skip"
    try:
        for row in _rows(use, registry):
            seen.add(replace(row, sample=None) if seen.leaves_out else row)
            if seen.rows % 512 == 0:
                advance(row)
        seen.look_at_images()
        if seen.leaves_out:
            seen.leaves_out = False
            data = registry.build(use)
            for index in range(len(data)):
                seen.measure(data[index])
    except DataError as error:  # nothing behind it can be read
        seen.leaves_out = False
        seen.find(Finding("file", str(error)))
        seen.look_at_images()


def _rows(use: Use[Dataset], registry: Registry) -> Iterator[Inspected]:
    component = registry.chosen(use)
    rows = component.inspect(component.Options.model_validate(use.options))
    if rows is not None:
        yield from rows
        return
    data = registry.build(use)
    for index in range(len(data)):
        read = (index + 1) / len(data)
        try:
            sample = data[index]
        except DataError as error:
            yield Inspected(f"#{index + 1}", None, (Finding("samples", str(error)),), (), read)
            continue
        try:
            sample.check()
        except DataError as error:
            finding = Finding("conversations", str(error))
            yield Inspected(sample.id, None, (finding,), sample.images, read)
        else:
            yield Inspected(sample.id, sample, (), sample.images, read)


class _Seen:
    """What was seen so far."""

    def __init__(self, lengths: Lengths, thorough: bool) -> None:
        self.rows = 0
        self.leaves_out = False  # whether what is found is left out of a training
        self._lengths, self._thorough = lengths, thorough
        self._findings: dict[str, Sort] = {}
        self._ids: set[int] = set()  # hashes take a third of the texts' room
        self._images: set[int] = set()
        self._clips: set[int] = set()
        self._left_out: set[int] = set()  # faulty images that stopped nothing so far
        self._waiting: list[tuple[str, str]] = []  # images to look at, and whose they are
        self._tokens, self._supervised = array("q"), array("q")
        self._by_images = [0, 0, 0]  # samples with none, one, several
        self._preferences = 0  # samples with a rejected answer, too
        self._turns = self._most_turns = self._mentions = self._cut = self._videos = 0

    @property
    def stops(self) -> bool:
        """Whether something was found that stops a training."""
        return any(sort.stops for sort in self._findings.values())

    def find(self, finding: Finding) -> None:
        """Count a finding."""
        stops = finding.stops and not self.leaves_out
        sort = self._findings.setdefault(
            finding.sort, Sort(sort=finding.sort, count=0, stops=stops, messages=[])
        )
        sort.count += 1
        sort.stops |= stops
        if len(sort.messages) < KEPT:
            sort.messages.append(finding.message)

    def add(self, row: Inspected) -> None:
        self.rows += 1
        for finding in row.findings:
            self.find(finding)
        key = hash(row.id)
        if key in self._ids:
            text = f"sample `{row.id:.200}` is there more than once"
            self.find(Finding("duplicate ids", text, stops=False))
        self._ids.add(key)
        self._mentions += len(row.images)
        for image in row.images:
            if isinstance(image, Video):
                self._videos += 1
                clip = _key(image.source)
                if clip not in self._clips or self.leaves_out:
                    self._judge(image, row.id)
                self._clips.add(clip)
            elif not isinstance(image, Path | str):  # in memory, or in another file
                self._images.add(_key(image))
                self._judge(image, row.id)
            elif (key := hash(str(image))) not in self._images or (
                not self.leaves_out and key in self._left_out
            ):
                self._images.add(key)
                self._left_out.discard(key)
                self._waiting.append((str(image), row.id))
        if len(self._waiting) >= _AT_ONCE:
            self.look_at_images()
        if row.sample is not None:
            self.measure(row.sample)

    def look_at_images(self) -> None:
        """Look at the images that wait for it."""
        paths = [path for path, _ in self._waiting]
        looks = whole_images(paths, thorough=self._thorough)
        for (path, identity), whole in zip(self._waiting, looks, strict=True):
            if not whole:
                self._judge(Path(path), identity)
                if self.leaves_out:
                    self._left_out.add(hash(path))
        self._waiting.clear()

    def _judge(self, image: ImageSource, identity: str) -> None:
        where, what = f"sample `{identity:.200}`", "images"
        try:
            if isinstance(image, Video):
                what = "videos"
                check_video(image, where, thorough=self._thorough)
            elif self._thorough:
                open_image(image, where)
            else:
                check_image(image, where)
        except MissingImage as error:
            self.find(Finding(f"missing {what}", str(error)))
        except DataError as error:
            self.find(Finding(f"broken {what}", str(error)))

    def measure(self, sample: Sample) -> None:
        """Count a sample's turns and tokens; of a preference those with either answer."""
        if sample.rejected is not None:
            worse = (*sample.turns[:-1], Turn("gpt", sample.rejected))
            with_worse = replace(sample, turns=worse, rejected=None)
            try:
                with_worse.check()
                tokens, supervised = self._lengths.count(with_worse)
            except DataError as error:
                self.find(Finding("rejected answers", str(error)))
                return
            self._tokens.append(tokens)
            self._supervised.append(supervised)
            if tokens > self._lengths.max_length:
                who = f"sample `{sample.id:.200}` with its rejected answer"
                self.find(Finding("samples that are cut", f"{who} takes {tokens} tokens", False))
        try:
            tokens, supervised = self._lengths.count(sample)
        except ModelError as error:  # the tiling shows no videos
            self.find(Finding("videos that are not shown", str(error), stops=False))
            tokens, supervised = self._lengths.count(sample, as_images=True)
        except DataError as error:
            self.find(Finding("prompt template", str(error)))
            return
        self._preferences += sample.rejected is not None
        self._by_images[min(2, len(sample.images))] += 1
        self._turns += len(sample.turns)
        self._most_turns = max(self._most_turns, len(sample.turns))
        self._tokens.append(tokens)
        self._supervised.append(supervised)
        if any(turn.role == "gpt" and not turn.text.strip() for turn in sample.turns):
            self.find(
                Finding(
                    "empty answers", f"sample `{sample.id:.200}` has an empty answer", stops=False
                )
            )
        longest = self._lengths.max_length
        if tokens > longest:
            self._cut += 1
            self.find(
                Finding(
                    "samples that are cut",
                    f"sample `{sample.id:.200}` takes {tokens} tokens, of {longest} at most",
                    stops=False,
                )
            )
        if not supervised:
            why = "its answers lie behind the cut" if tokens > longest else "it has no answer"
            self.find(
                Finding("nothing learned", f"sample `{sample.id:.200}` teaches nothing: {why}")
            )

    def count(self, sort: str) -> int:
        """Return how many findings of a sort there are."""
        return self._findings[sort].count if sort in self._findings else 0

    def report(self, data: str, seconds: float) -> Report:
        text, one, several = self._by_images
        order = sorted(self._findings.values(), key=lambda sort: (not sort.stops, sort.sort))
        exact = self._lengths.tokenizer is not None
        return Report(
            data=data,
            usable=bool(self._tokens) and not self.stops,
            rows=self.rows,
            samples=text + one + several,
            image_samples=one,
            multi_image_samples=several,
            text_samples=text,
            preferences=self._preferences,
            turns=self._turns,
            most_turns=self._most_turns,
            images=self._mentions - self._videos,
            videos=self._videos,
            distinct_videos=len(self._clips),
            distinct_images=len(self._images),
            missing_images=self.count("missing images"),
            broken_images=self.count("broken images"),
            duplicate_ids=self.count("duplicate ids"),
            max_length=self._lengths.max_length,
            visual_tokens=self._lengths.views.view.tokens,
            tiling=tiling.name if (tiling := self._lengths.views.tiling) is not None else None,
            counted_with="the tokenizer" if exact else "characters (an estimate)",
            tokens=distribution(np.asarray(self._tokens)),
            learned_tokens=distribution(np.asarray(self._supervised)),
            cut=self._cut,
            nothing_learned=self.count("nothing learned"),
            findings=order,
            seconds=round(seconds, 2),
            rows_per_second=round(self.rows / max(seconds, 1e-9), 1),
        )


def _key(source: Any) -> int:
    """Return what tells a file from others; of pixels, the object."""
    named = str(source) if isinstance(source, ImageFile) else source
    return hash(named) if isinstance(named, str | bytes) else id(source)
