"""Reads the JSON of the LLaVA papers, a list of `{id, image, conversations}`, and of messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from llavakit import (
    DataError,
    ImageSource,
    InputPath,
    Options,
    Sample,
    Video,
    and_more,
)
from llavakit.contracts.data import Finding, Inspected
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.boxes import Aspect, with_moved_boxes
from llavakit_plugins.datasets.conversation_rows import RowReader, attempt
from llavakit_plugins.datasets.expected import CHARACTERS_A_TOKEN, Expected
from llavakit_plugins.datasets.image_files import check_image, whole_images
from llavakit_plugins.datasets.json_stream import Row
from llavakit_plugins.datasets.kept_rows import KeptRows
from llavakit_plugins.datasets.streaming import StoredRows, count_rows, read_rows
from llavakit_plugins.media import MissingImage

_LOOKED_AT = 4096  # rows that a plan reads to learn how long they are
_NAMED = 3
_LONGEST_NAME = 200  # characters of an id that messages show
_KEYS = ("conversations", "messages")  # of which each row has one
_SHOWN_EVERY = 256  # rows or images


class ConversationsOptions(Options):
    path: InputPath
    """One JSON list, or JSON Lines (`.jsonl`)."""
    images: InputPath | None = None
    """The folder of the images; by default the folder of the file."""
    kind: str = ""
    """The kind of responses in the file, for losses by kind."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many samples from the start."""
    unusable: Literal["refuse", "skip"] = "refuse"
    """What to do with samples that cannot be used, and with missing or broken images: refuse the
    file, or skip these samples and name them."""
    boxes: Literal["none", "normalised"] = "none"
    """Whether texts have boxes, `[left, top, right, bottom]` from 0 to 1 of the image in its file,
    which `aspect` moves. LLaVA-1.5's data has boxes of the padded square already: "none"."""
    aspect: Aspect = "squash"
    """What the vision encoder does to make a square, for `boxes`: its own `aspect`. Tilings and
    squashing move no box."""
    expect: Expected | None = None


class Conversations(KeptRows):
    """LLaVA's training JSON, as it is; rows may also have `messages`, as transformers writes them,
    and preferences a `chosen` and a `rejected` answer.

    A first turn from `gpt` is dropped, as in the original with every template except v0. A row may
    have several images: then `image` is a list, in the order of the placeholders. The rows stay in
    the file; memory holds only the offset of each.

    Raises DataError if the file, a row, or an image's path cannot be used.
    """

    name = "conversations"
    Options = ConversationsOptions

    def __init__(
        self, options: ConversationsOptions, progress: Progress = lambda *_, **__: None
    ) -> None:
        self.options = options
        self.folder = options.images or options.path.parent
        self._reader = RowReader(str(options.path), self.folder, options.kind)
        self._rows = StoredRows(options.path)
        self._left_out: list[str] = []
        skip = options.unusable == "skip"
        bad: set[int] = set()
        images: dict[str, int] = {}
        videos: dict[str, Video] = {}
        # a missing file is reported by the reader, with its remedy
        size = max(1, options.path.stat().st_size) if options.path.is_file() else 1
        for number, row in enumerate(islice(read_rows(options.path), options.limit)):
            self._rows.append(row)
            if number % _SHOWN_EVERY == 0:
                progress(round(1000 * row.start / size), 1000, f"{number:,} rows read")
            try:
                _refuse_doubled(row, number, self._reader)
                sample = self._boxed(self._reader.sample(row.value, number))
            except DataError as error:
                if not skip:
                    raise
                bad.add(number)
                self._left_out.append(str(error))
                continue
            for image in sample.images:
                # each is looked at once, and named by the first sample that shows it
                if isinstance(image, Path):
                    images.setdefault(str(image), number)
                elif isinstance(image, Video):
                    videos.setdefault(_name(image), image)
                    images.setdefault(_name(image), number)
        broken = self._broken(images, videos, progress)
        if broken and not skip:
            raise self._refusal(broken, images)
        if broken:
            bad |= self._about(broken)
            self._left_out += map(str, broken.values())
        if bad:
            self._leave_out(bad)

    def __getitem__(self, index: int) -> Sample:
        number = self._number(index)
        return self._boxed(self._reader.sample(self._rows[number], number))

    def _boxed(self, sample: Sample) -> Sample:
        """Return a sample with its boxes where the encoder sees them."""
        if self.options.boxes == "none":
            return sample
        return with_moved_boxes(sample, self.options.aspect)

    def notes(self) -> list[str]:
        if self._numbers is None:
            return []
        out = len(self._rows) - len(self)
        more = f"; and {len(self._left_out) - _NAMED} more" * (len(self._left_out) > _NAMED)
        return [
            f"{self.options.path}: {out} of {len(self._rows)} samples are left out: "
            f"{'; '.join(self._left_out[:_NAMED])}{more}"
        ]

    @classmethod
    def expect(cls, options: ConversationsOptions) -> tuple[int, int] | None:
        if options.path.is_file():
            most = min(_LOOKED_AT, options.limit or _LOOKED_AT)
            rows = list(islice(read_rows(options.path), most))
            count = len(rows)
            # a longer file is counted without parsing:
            # a plan of a million rows should take a second
            if count == _LOOKED_AT:
                count = sum(count_rows(options.path, key) for key in _KEYS)
                count = count or count_rows(options.path, "chosen")
            texts = (*_KEYS, "prompt", "chosen")
            text = sum(len(str(row.value.get(key, ""))) for row in rows for key in texts)
            return min(count, options.limit or count), round(
                text / CHARACTERS_A_TOKEN / max(1, len(rows))
            )
        return options.expect.upto(options.limit) if options.expect else None

    @classmethod
    def inspect(cls, options: ConversationsOptions) -> Iterator[Inspected]:
        folder = options.images or options.path.parent
        size = max(1, options.path.stat().st_size)
        reader = RowReader(str(options.path), folder, options.kind)
        for number, row in enumerate(islice(read_rows(options.path), options.limit)):
            sample, problems, images = reader.inspect(row.value, number)
            doubled = attempt(partial(_refuse_doubled, row, number, reader), "doubled keys")
            if doubled is not None:
                sample, problems = None, [doubled, *problems]
            if sample is not None and options.boxes != "none":
                moved = attempt(partial(with_moved_boxes, sample, options.aspect), "boxes")
                if isinstance(moved, Finding):
                    sample, problems = None, [*problems, moved]
                else:
                    sample = moved
            read = (row.start + row.length) / size
            identity = reader.name(row.value, number)[0]
            yield Inspected(identity, sample, tuple(problems), images, read)

    def _broken(
        self, images: Mapping[str, int], videos: Mapping[str, Video], progress: Progress
    ) -> dict[str, DataError]:
        """Return the images and videos that cannot be used: hours of work may depend on them."""
        found: dict[str, DataError] = {}
        files = (image for image in images if image not in videos)
        whole_ones = whole_images(files)
        looks = ((item, item[0] not in videos and next(whole_ones)) for item in images.items())
        for done, ((image, number), whole) in enumerate(looks):
            if done % _SHOWN_EVERY == 0:
                note = f", {len(found):,} cannot be used" if found else ""
                progress(done, len(images), f"images looked at{note}")
            if not whole:
                try:
                    check_image(videos.get(image, image), f"sample `{self._id(number)}`")
                except DataError as error:
                    found[image] = error
        return found

    def _refusal(self, broken: Mapping[str, DataError], images: Mapping[str, int]) -> DataError:
        path, skip = self.options.path, 'or set unusable = "skip" to leave their samples out'
        missing = {image: e for image, e in broken.items() if isinstance(e, MissingImage)}
        if missing:
            names = and_more(
                missing, _NAMED, lambda image: f"{image:.1000} (sample `{self._id(images[image])}`)"
            )
            remedies = dict.fromkeys(error.remedy for error in missing.values())
            return DataError(
                f"{path}: {len(missing)} of {len(images)} images are missing: {names}; "
                f"{'; '.join(remedies)}, {skip}"
            )
        more = f" ({len(broken) - 1} more cannot be used)" if len(broken) > 1 else ""
        return DataError(f"{path}: {next(iter(broken.values()))}{more}; {skip}")

    def _id(self, number: int) -> str:
        return self._reader.name(self._rows[number], number)[0][:_LONGEST_NAME]

    def _about(self, images: Mapping[str, object]) -> set[int]:
        """Return the rows about any of these images."""
        found = set()
        for number in range(len(self._rows)):
            try:
                sample = self._reader.sample(self._rows[number], number)
            except DataError:  # left out already, with its reason
                continue
            if any(_name(image) in images for image in sample.images):
                found.add(number)
        return found


def _name(image: ImageSource) -> str:
    return str(image.source if isinstance(image, Video) else image)


def _refuse_doubled(row: Row, number: int, reader: RowReader) -> None:
    if row.doubled is not None:
        _, where = reader.name(row.value, number)
        raise DataError(f"{where}: `{row.doubled:.80}` is there more than once; keep one of it")
