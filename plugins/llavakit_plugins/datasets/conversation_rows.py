"""Rows of conversations become samples: LLaVA's own, and messages as transformers has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llavakit import VIDEO, DataError, ImageSource, Sample, Turn, Video, Visuals, read_messages
from llavakit.contracts.data import Finding
from llavakit_plugins.datasets.image_files import inside
from llavakit_plugins.datasets.preferences import KEYS, as_conversation, is_preference
from llavakit_plugins.media.addresses import embedded, is_embedded

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_OF_ROWS = frozenset(
    ("id", "image", "images", "video", "videos", "conversations", "messages", "system", *KEYS)
)
_OF_TURNS = frozenset(("from", "value", "role", "content"))
# Keys are matched whole where training would refuse the row, and in part for a report's remarks:
# `image_id` is no image, but its author may want to know that it is not read.
_OF_IMAGES = re.compile(r"(image|img|picture|photo)s?(_?(path|file|url)s?)?", re.IGNORECASE)
_OF_OTHERS = re.compile(r"(video|audio|sound|speech|frame)s?(_?(path|file|url)s?)?", re.IGNORECASE)
_OF_MEDIA = re.compile(
    r"image|img|picture|photo|video|audio|sound|speech|frame|media|pixel", re.IGNORECASE
)
# in the middle of an answer they are HTML's
_VIDEO = re.compile(r"^\s*<video>|<video>\s*$")
_AUDIO = re.compile(r"^\s*<audio>|<audio>\s*$")
_LONGEST_NAME = 200  # characters of an id that messages show

Row = Mapping[str, Any]
Images = tuple[ImageSource, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one data set. Raises DataError where one cannot be used."""

    data: str
    """What errors call the data set: its file, as a rule."""
    folder: Path
    """Where the images lie that rows name."""
    kind: str = ""

    def sample(self, row: Row, number: int) -> Sample:
        """Return the sample of a row; `number` counts from 0."""
        identity, where = self.name(row, number)
        refuse_media(row, where)
        sample = self._content(row, identity, where)
        sample.check(self.data)
        return sample

    def name(self, row: Row, number: int) -> tuple[str, str]:
        """Return a row's id, its number where it has none, and how errors name it."""
        given = row.get("id")
        identity = f"#{number + 1}" if given is None or given == "" else str(given)
        return identity, f"sample `{identity[:_LONGEST_NAME]}` of {self.data}"

    def inspect(self, row: Row, number: int) -> tuple[Sample | None, list[Finding], Images]:
        """Return a row's sample, or what is wrong with the row; and its images, where known."""
        identity, where = self.name(row, number)
        media = attempt(partial(refuse_media, row, where), "unread media")
        images = attempt(partial(self._visuals, row, where), "image paths")
        content: object = attempt(
            partial(self._content, row, identity, where)
            if "messages" in row or is_preference(row)
            else partial(_conversation, row, where),
            "conversations",
        )
        tried = (media, content, images)
        problems = [found for found in tried if isinstance(found, Finding)]
        sample = None
        if not problems:
            try:
                sample = self._content(row, identity, where)
                sample.check(self.data)
            except DataError as error:
                sample = None
                problems.append(Finding("conversations", str(error)))
        if media is None:
            problems += _unread(row, where)
        shown = () if sample is None and isinstance(images, Finding) else images
        known = sample.images if sample is not None else shown
        return sample, problems, known if isinstance(known, tuple) else ()

    def video(self, named: object, where: str) -> Video:
        """Return a video that a row names, as `image` does: a file, or a folder of frames."""
        return Video(self.image(named, where, "video"))

    def image(self, named: object, where: str, what: str = "image") -> ImageSource:
        """Return an image that a row names: a path below the folder, a `data:` address, or what a
        data set with images inside has, `{"bytes": ..., "path": ...}`."""
        if isinstance(named, str) and not is_embedded(named):
            return self.named(named, where, what)
        if isinstance(named, Mapping) and _is_inside(named):
            return bytes(named["bytes"])
        if isinstance(named, Mapping) and isinstance(named.get("path"), str):
            return self.named(named["path"], where, what)
        if isinstance(named, bytes):
            return named
        if isinstance(named, str):
            head = named.partition(",")[0]
            try:
                if not head.lower().endswith(";base64"):
                    raise ValueError("it does not end in `;base64`")
                return embedded(named)
            except ValueError as error:
                raise DataError(
                    f"{where}: the {what} `{head:.80}` is no address of base64: {error}; fix it"
                ) from None
        an = "an image" if what == "image" else f"a {what}"
        raise DataError(f"{where}: {an} is a path, or a list of paths, got {named!r:.80}")

    def named(self, name: str, where: str, what: str = "image") -> ImageSource:
        """Return the image, or what it is, of a name. DataError for one that leaves the folder."""
        return inside(self.folder, name, where, what)

    def _content(self, row: Row, identity: str, where: str, said: str = "`messages`") -> Sample:
        images = self._visuals(row, where)
        if is_preference(row):
            plain, rejected, said = as_conversation(row, where, rows_of)
            return replace(self._content(plain, identity, where, said), rejected=rejected)
        if "messages" not in row:
            turns, system = _conversation(row, where)
            if any(VIDEO in turn.text for turn in turns) or row.get("video") or row.get("videos"):
                turns, images = _with_videos(turns, images, where)
            return Sample(identity, turns, images, self.kind, system)
        if row.get("conversations") is not None:
            raise DataError(f"{where} has `conversations` and `messages`; keep one of them")
        sample = read_messages(
            self._with_images(rows_of(row["messages"]), where),
            images,
            where=f"{where}: {said}",
            source=lambda named: self.image(named, where),
            video=lambda named: self.video(named, where),
            id=identity,
            kind=self.kind,
        )
        _refuse_answers(sample.turns, where)
        system = _system(row, where)
        if system is not None and sample.system is not None:
            raise DataError(f"{where} has `system` and a message from system; keep one of them")
        return sample if system is None else replace(sample, system=system)

    def _with_images(self, messages: object, where: str) -> object:
        """Return messages in which what a table of images has inside of a part is an image."""
        if not isinstance(messages, list):
            return messages
        found: list[object] = []
        for message in messages:
            content = rows_of(message.get("content")) if isinstance(message, dict) else None
            if isinstance(content, list):
                parts = [
                    {**part, key: self.image(part[key], where, key)}
                    if isinstance(part, dict) and _is_inside(part.get(key := str(part.get("type"))))
                    else part
                    for part in content
                ]
                message = {**message, "content": parts}
            found.append(message)
        return found

    def _visuals(self, row: Row, where: str) -> Images:
        """Return a row's images, and its videos behind them."""
        images = [self.image(name, where) for name in self._names(row, "image", where)]
        videos = [self.video(name, where) for name in self._names(row, "video", where)]
        return (*images, *videos)

    def _names(self, row: Row, key: str, where: str) -> list[Any]:
        names, more = row.get(key), row.get(f"{key}s")
        if names is None and more is None:
            return []
        if names is not None and more is not None:
            raise DataError(f"{where} has `{key}` and `{key}s`; keep one of them")
        key, names = (key, names) if more is None else (f"{key}s", more)
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(name, str | bytes | Mapping) for name in names):
            raise DataError(f"{where}: `{key}` is a path, or a list of paths, got {names!r:.80}")
        if not all(name.strip() for name in names if isinstance(name, str)):
            raise DataError(
                f"{where}: `{key}` is an empty text; name a file, or leave `{key}` out of a row of "
                "text"
            )
        return names


def _is_inside(named: object) -> bool:
    return isinstance(named, Mapping) and isinstance(named.get("bytes"), bytes)


def attempt(read: Callable[[], T], sort: str) -> T | Finding:
    """Return what `read` gives, or what it complains of as a finding of this sort."""
    try:
        return read()
    except DataError as error:
        return Finding(sort, str(error))


def rows_of(value: object) -> object:
    """Return a list of tables; `datasets` may give a table of lists in its place."""
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        keys = list(value)
        return [
            dict(zip(keys, found, strict=False)) for found in zip(*value.values(), strict=False)
        ]
    return value


def refuse_media(row: Row, where: str) -> None:
    """Raise DataError for what the answers may be about and training would not show."""
    for table, key in _other_keys(row):
        others, images = _OF_OTHERS.fullmatch(key), _OF_IMAGES.fullmatch(key)
        if table[key] and (others or (images and not (row.get("image") or row.get("images")))):
            raise DataError(
                f"{where}: `{key:.80}` is not read: only images under `image` and videos under "
                "`video` are; put them there, or remove the sample"
            )


def _unread(row: Row, where: str) -> list[Finding]:
    """Return what should be known of what seems to name media, and hinders nothing."""
    found = [
        f"`{key:.80}` is not read"
        for table, key in _other_keys(row)
        if _OF_MEDIA.search(key) and table[key] and isinstance(table[key], str | list | dict)
    ]
    values = [turn.get("value", turn.get("content")) for turn in _turns_of(row)]
    if any(isinstance(value, str) and _AUDIO.search(value) for value in values):
        found.append("`<audio>` is a word like others: there is nothing to hear there")
    return [Finding("media keys", f"{where}: {text}", stops=False) for text in found]


def _other_keys(row: Row) -> list[tuple[Row, str]]:
    """Return the keys of a row and its turns that no reader knows, each with its table."""
    others = [(row, key) for key in row if key not in _OF_ROWS]
    return others + [(turn, key) for turn in _turns_of(row) for key in turn if key not in _OF_TURNS]


def _turns_of(row: Row) -> list[Row]:
    turns = rows_of(row.get("messages") or row.get("conversations"))
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []


def _conversation(row: Row, where: str) -> tuple[tuple[Turn, ...], str | None]:
    """Return the turns of a row, and its system text where it has one of its own.

    A first turn from `gpt` is dropped, as in the original with every template except v0.
    """
    turns: list[Turn] = []
    system = _system(row, where)
    conversations = rows_of(row.get("conversations"))
    if not isinstance(conversations, list):
        raise DataError(f"{where} has no list `conversations`; add it")
    for number, turn in enumerate(conversations):
        given = str(turn.get("from")) if isinstance(turn, dict) else ""
        role = _ROLES.get(given)
        if (role is None and given != "system") or not isinstance(text := turn.get("value"), str):
            raise DataError(
                f"{where}: a turn needs `from` (human or gpt) and `value` (text), got {turn!r:.80}"
            )
        if role is None:
            if number or system is not None:
                raise DataError(
                    f"{where}: a turn from system stands first, and alone; keep one system text"
                )
            system = text
        elif turns or role == "human":
            turns.append(Turn(role, text))  # type: ignore[arg-type]
    return tuple(turns), system


def _with_videos(
    turns: tuple[Turn, ...], visuals: Images, where: str
) -> tuple[tuple[Turn, ...], Images]:
    """Return turns with one placeholder for images and videos, and both in their order."""
    found = Visuals(visuals, where)
    turns = tuple(
        turn._replace(text=found.place(turn.text)) if turn.role == "human" else turn
        for turn in turns
    )
    _refuse_answers(turns, where)
    return turns, found.all


def _refuse_answers(turns: tuple[Turn, ...], where: str) -> None:
    """Raise DataError for an answer that begins or ends with a video's placeholder."""
    for turn in turns:
        if turn.role == "gpt" and VIDEO in turn.text and _VIDEO.search(turn.text):
            raise DataError(
                f"{where}: an answer begins or ends with `{VIDEO}`, which only a question may; "
                "remove it"
            )


def _system(row: Row, where: str) -> str | None:
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"{where}: `system` is a text, got {system!r:.80}")
    return system
