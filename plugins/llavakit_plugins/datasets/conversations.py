"""Reads the JSON of the LLaVA papers, a list of `{id, image, conversations}`, and of messages."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Literal

from pydantic import Field

from llavakit import DataError, InputPath, Options, Sample
from llavakit.contracts.data import Finding, Inspected
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.boxes import Aspect, with_moved_boxes
from llavakit_plugins.datasets.conversation_rows import RowReader, attempt
from llavakit_plugins.datasets.distinct_images import DistinctImages, name_of
from llavakit_plugins.datasets.expected import CHARACTERS_A_TOKEN, Expected
from llavakit_plugins.datasets.json_stream import Row
from llavakit_plugins.datasets.kept_rows import KeptRows
from llavakit_plugins.datasets.streaming import StoredRows, count_rows, read_rows

_LOOKED_AT = 4096  # rows that a plan reads to learn how long they are
_NAMED = 3
_LONGEST_NAME = 200  # characters of an id that messages show
_KEYS = ("conversations", "messages")  # of which each row has one
_SHOWN_EVERY = 256  # rows


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
        self._reasons: list[str] = []  # why the first samples are left out
        self._reason_count = 0
        skip = options.unusable == "skip"
        bad: set[int] = set()
        images = DistinctImages(self._id, keep_names=skip)
        # a missing file is reported by the reader, with its remedy
        size = max(1, options.path.stat().st_size) if options.path.is_file() else 1

        def reading(_: int = 0) -> None:
            progress(round(1000 * row.start / size), 1000, f"{number:,} rows read{images.note}")

        def looking(total: int) -> None:
            progress(images.looked_at, total, f"images looked at{images.note}")

        for number, row in enumerate(islice(read_rows(options.path), options.limit)):
            self._rows.append(row)
            if number % _SHOWN_EVERY == 0:
                reading()
            try:
                _refuse_doubled(row, number, self._reader)
                sample = self._boxed(self._reader.sample(row.value, number))
            except DataError as error:
                if not skip:
                    raise
                bad.add(number)
                self._because([str(error)], 1)
                continue
            images.add(sample.images, number)
            if images.are_many:
                images.look(reading)
        images.look(looking)
        if images.broken and not skip:
            raise images.refusal(
                options.path, 'or set unusable = "skip" to leave their samples out'
            )
        if images.broken:
            bad |= self._about(images.names)
            self._because(images.reasons, images.broken)
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
        more = f"; and {self._reason_count - _NAMED} more" * (self._reason_count > _NAMED)
        return [
            f"{self.options.path}: {out} of {len(self._rows)} samples are left out: "
            f"{'; '.join(self._reasons)}{more}"
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

    def _because(self, reasons: Sequence[str], count: int) -> None:
        """Count what samples are left out for, and keep the first reasons."""
        self._reasons += reasons[: max(0, _NAMED - len(self._reasons))]
        self._reason_count += count

    def _id(self, number: int) -> str:
        return self._reader.name(self._rows[number], number)[0][:_LONGEST_NAME]

    def _about(self, images: Container[str]) -> set[int]:
        """Return the rows about any of these images."""
        found = set()
        for number in range(len(self._rows)):
            try:
                sample = self._reader.sample(self._rows[number], number)
            except DataError:  # left out already, with its reason
                continue
            if any(name_of(image) in images for image in sample.images):
                found.add(number)
        return found


def _refuse_doubled(row: Row, number: int, reader: RowReader) -> None:
    if row.doubled is not None:
        _, where = reader.name(row.value, number)
        raise DataError(f"{where}: `{row.doubled:.80}` is there more than once; keep one of it")
