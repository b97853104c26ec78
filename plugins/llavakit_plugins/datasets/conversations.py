"""Reads the JSON of the LLaVA papers: a list of `{id, image, conversations}`."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from llavakit import (
    DataError,
    Dataset,
    InputPath,
    MissingImage,
    Options,
    Sample,
    Turn,
    and_more,
)
from llavakit.contracts.data import CHARACTERS_A_TOKEN, Finding, Inspected
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.expected import Expected
from llavakit_plugins.datasets.image_files import check_image, inside, whole_images
from llavakit_plugins.datasets.json_stream import Row
from llavakit_plugins.datasets.streaming import StoredRows, count_rows, read_rows

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_OF_ROWS = frozenset(("id", "image", "images", "conversations"))
_OF_TURNS = frozenset(("from", "value"))
_OF_IMAGES = re.compile(r"(image|img|picture|photo)s?(_?(path|file|url)s?)?", re.IGNORECASE)
_OF_OTHERS = re.compile(r"(video|audio|sound|speech|frame)s?(_?(path|file|url)s?)?", re.IGNORECASE)
_OF_MEDIA = re.compile(
    r"image|img|picture|photo|video|audio|sound|speech|frame|media|pixel", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"^\s*<(?:video|audio)>|<(?:video|audio)>\s*$")
_LOOKED_AT = 4096  # rows that a plan reads to learn how long they are
_NAMED = 3
_LONGEST_NAME = 200  # characters of an id that messages show
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
    expect: Expected | None = None


class Conversations(Dataset):
    """LLaVA's training JSON, as it is.

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
        self._rows = StoredRows(options.path)
        self._numbers: Sequence[int] | None = None
        """Of the rows that are used, from 0; None for all."""
        self._left_out: list[str] = []
        skip = options.unusable == "skip"
        bad: set[int] = set()
        images: dict[str, int] = {}
        size = max(1, options.path.stat().st_size) if options.path.is_file() else 1
        for number, row in enumerate(islice(read_rows(options.path), options.limit)):
            self._rows.append(row)
            if number % _SHOWN_EVERY == 0:
                progress(round(1000 * row.start / size), 1000, f"{number:,} rows read")
            try:
                _refuse_doubled(row, number, options)
                sample = read_sample(row.value, number, options, self.folder)
            except DataError as error:
                if not skip:
                    raise
                bad.add(number)
                self._left_out.append(str(error))
                continue
            for image in sample.images:
                images.setdefault(str(image), number)
        broken = self._broken(images, progress)
        if broken and not skip:
            raise self._refusal(broken, images)
        if broken:
            bad |= self._about(broken)
            self._left_out += map(str, broken.values())
        if bad:
            self._numbers = array("q", (n for n in range(len(self._rows)) if n not in bad))

    def __len__(self) -> int:
        return len(self._rows) if self._numbers is None else len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index if self._numbers is None else self._numbers[index]
        return read_sample(self._rows[number], number, self.options, self.folder)

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
            if count == _LOOKED_AT:
                count = count_rows(options.path, "conversations")
            text = sum(len(str(row.value.get("conversations"))) for row in rows)
            return min(count, options.limit or count), round(
                text / CHARACTERS_A_TOKEN / max(1, len(rows))
            )
        return options.expect.upto(options.limit) if options.expect else None

    @classmethod
    def inspect(cls, options: ConversationsOptions) -> Iterator[Inspected]:
        folder = options.images or options.path.parent
        size = max(1, options.path.stat().st_size)
        for number, row in enumerate(islice(read_rows(options.path), options.limit)):
            identity, where = _name(row.value, number, options)
            doubled = _attempt(partial(_refuse_doubled, row, number, options), "doubled keys")
            media = _attempt(partial(_refuse_media, row.value, where), "unread media")
            turns = _attempt(partial(_turns, row.value, where), "conversations")
            images = _attempt(partial(_images, row.value, where, folder), "image paths")
            tried = (doubled, media, turns, images)
            problems = [found for found in tried if isinstance(found, Finding)]
            sample = None
            if not problems and not isinstance(turns, Finding) and not isinstance(images, Finding):
                sample = Sample(identity, turns, images, options.kind)
                try:
                    sample.check(str(options.path))
                except DataError as error:
                    sample = None
                    problems.append(Finding("conversations", str(error)))
            if media is None:
                problems += _unread(row.value, where)
            known = () if isinstance(images, Finding) else images
            read = (row.start + row.length) / size
            yield Inspected(identity, sample, tuple(problems), known, read)

    def _broken(self, images: Mapping[str, int], progress: Progress) -> dict[str, DataError]:
        """Return the images that cannot be used: hours of work may depend on them."""
        found: dict[str, DataError] = {}
        looks = zip(images.items(), whole_images(images), strict=True)
        for done, ((image, number), whole) in enumerate(looks):
            if done % _SHOWN_EVERY == 0:
                note = f", {len(found):,} cannot be used" if found else ""
                progress(done, len(images), f"images looked at{note}")
            if not whole:
                try:
                    check_image(image, f"sample `{self._id(number)}`")
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
        return _name(self._rows[number], number, self.options)[0][:_LONGEST_NAME]

    def _about(self, images: Mapping[str, object]) -> set[int]:
        """Return the rows about any of these images."""
        found = set()
        for number in range(len(self._rows)):
            try:
                sample = read_sample(self._rows[number], number, self.options, self.folder)
            except DataError:  # left out already, with its reason
                continue
            if any(str(image) in images for image in sample.images):
                found.add(number)
        return found


T = TypeVar("T")


def _attempt(read: Callable[[], T], sort: str) -> T | Finding:
    try:
        return read()
    except DataError as error:
        return Finding(sort, str(error))


def read_sample(
    row: Mapping[str, Any], number: int, options: ConversationsOptions, folder: Path
) -> Sample:
    """Return the sample of a row; `index` counts from 0. Raises DataError if it cannot be used."""
    identity, where = _name(row, number, options)
    _refuse_media(row, where)
    sample = Sample(identity, _turns(row, where), _images(row, where, folder), options.kind)
    sample.check(str(options.path))
    return sample


def _name(row: Mapping[str, Any], number: int, options: ConversationsOptions) -> tuple[str, str]:
    """Return a row's id, its number where it has none, and how errors name it."""
    given = row.get("id")
    identity = f"#{number + 1}" if given is None or given == "" else str(given)
    return identity, f"sample `{identity[:_LONGEST_NAME]}` of {options.path}"


def _refuse_doubled(row: Row, number: int, options: ConversationsOptions) -> None:
    if row.doubled is not None:
        _, where = _name(row.value, number, options)
        raise DataError(f"{where}: `{row.doubled:.80}` is there more than once; keep one of it")


def _refuse_media(row: Mapping[str, Any], where: str) -> None:
    """Raise DataError for what the answers may be about and training would not show."""
    for table, key in _other_keys(row):
        others, images = _OF_OTHERS.fullmatch(key), _OF_IMAGES.fullmatch(key)
        if table[key] and (others or (images and not (row.get("image") or row.get("images")))):
            raise DataError(
                f"{where}: `{key:.80}` is not read: only images under `image` are; put them there, "
                "or remove the sample"
            )


def _unread(row: Mapping[str, Any], where: str) -> list[Finding]:
    """Return what should be known of what seems to name media, and hinders nothing."""
    found = [
        f"`{key:.80}` is not read"
        for table, key in _other_keys(row)
        if _OF_MEDIA.search(key) and table[key] and isinstance(table[key], str | list | dict)
    ]
    turns = row.get("conversations")
    listed = turns if isinstance(turns, list) else []
    values = [turn.get("value") for turn in listed if isinstance(turn, dict)]
    if any(isinstance(value, str) and _PLACEHOLDER.search(value) for value in values):
        found.append("`<video>` or `<audio>` is a word like others: there is nothing to see there")
    return [Finding("media keys", f"{where}: {text}", stops=False) for text in found]


def _other_keys(row: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """Return the keys of a row and its turns that no reader knows, each with its table."""
    tables = [(row, row.keys() - _OF_ROWS)]
    turns = row.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and (others := turn.keys() - _OF_TURNS):
            tables.append((turn, others))
    return [(table, key) for table, others in tables for key in table if key in others]


def _turns(row: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    conversations = row.get("conversations")
    if not isinstance(conversations, list):
        raise DataError(f"{where} has no list `conversations`; add it")
    for turn in conversations:
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise DataError(
                f"{where}: a turn needs `from` (human or gpt) and `value` (text), got {turn!r:.80}"
            )
        if turns or role == "human":
            turns.append(Turn(role, turn["value"]))  # type: ignore[arg-type]
    return tuple(turns)


def _images(row: Mapping[str, Any], where: str, folder: Path) -> tuple[Path, ...]:
    names, more = row.get("image"), row.get("images")
    if names is not None and more is not None:
        raise DataError(f"{where} has `image` and `images`; keep one of them")
    key, names = ("image", names) if more is None else ("images", more)
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: `{key}` is a path, or a list of paths, got {names!r:.80}")
    if not all(map(str.strip, names)):
        raise DataError(
            f"{where}: `{key}` is an empty text; name a file, or leave `{key}` out of a row of text"
        )
    return tuple(inside(folder, name, where) for name in names)
