"""What a key's members in a shard say: a conversation, messages, or a caption of what is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from llavakit import VIDEO, DataError, ImageSource, and_more
from llavakit.contracts.data import IMAGE
from llavakit_plugins.datasets.conversation_rows import Row, RowReader, rows_of
from llavakit_plugins.datasets.rows import parse_json
from llavakit_plugins.datasets.stored_files import StoredFile
from llavakit_plugins.datasets.tar_shards import Group, is_video

_CONVERSATIONS = ("conversations", "messages", "chosen", "rejected")
_MARKS = re.compile(f'{VIDEO}|"type": "video"')  # of a video in a row's JSON


@dataclass(frozen=True)
class MemberReader(RowReader):
    """Reads a row whose images and videos are members of its key, whatever the row calls them."""

    key: str = ""
    images: Mapping[str, ImageSource] = field(default_factory=dict)
    """By extension; the files of videos, too."""

    def named(self, name: str, where: str, what: str = "image") -> ImageSource:
        """Return the member that a name stands for; of a single one, any name will do."""
        own = _of_kind(what, self.images)
        found = find_member(name, self.key, own)
        if found is not None:
            return self.images[found]
        if len(own) == 1:  # names of files as they were before they came into the shard
            return self.images[own[0]]
        there = and_more([f"{self.key}.{extension}" for extension in own])
        raise DataError(
            f"{where} shows `{name:.200}`, and "
            + (
                f"its {what}s are {there}; call it one of them"
                if there
                else f"has no {what} beside it"
            )
        )


def _of_kind(what: str, extensions: Iterable[str]) -> tuple[str, ...]:
    """Return the extensions of images, or of videos."""
    return tuple(one for one in extensions if is_video(one) == (what == "video"))


def find_member(name: str, key: str, extensions: Sequence[str]) -> str | None:
    """Return the extension of the member that a name means: all of its name, or its end."""
    for extension in extensions:
        member = f"{key}.{extension}"
        if name in (extension, member) or member.endswith(f"/{name}"):
            return extension
    return None


def choose_text(group: Group, shard: StoredFile) -> str:
    """Return the extension of the member that says what a sample is.

    That is JSON with a conversation, or else a caption: in `txt`, or under `caption` in JSON.
    Raises DataError where there is none.
    """
    where = f"key `{group.key:.200}` of {shard.address}"
    if "json" in group.texts:
        row = _parse(group.key, group.texts["json"], shard)
        if any(row.get(key) is not None for key in _CONVERSATIONS):
            return "json"
        if "txt" in group.texts:
            return "txt"
        if isinstance(row.get("caption"), str):
            return "json"
        raise DataError(
            f"{where}: its `json` has none of `conversations`, `messages`, `chosen` and `caption` "
            f"(it has {and_more(list(row), 8)}), and there is no `txt` beside it; add one"
        )
    if "txt" in group.texts:
        return "txt"
    raise DataError(
        f"{where} has an image or a video, but neither `json` nor `txt` beside it; add one, or "
        "remove it"
    )


def read_row(
    key: str,
    extension: str,
    content: bytes,
    images: Mapping[str, ImageSource],
    shard: StoredFile,
    questions: Sequence[str],
    kind: str = "",
) -> tuple[MemberReader, Row]:
    """Return the row of a key in LLaVA's form, and what reads it. Raises DataError.

    `extension` and `content` are those of the member that `choose_text` chose. A caption answers
    one of the `questions`, always the same one.
    """
    # what names a sample names its shard, too: keys are often the same numbers in each
    identity = f"{shard.name}/{key.removeprefix('./')}"
    reader = MemberReader(shard.address, Path(), kind, key, images)
    if extension == "json":
        row = _parse(key, content, shard)
        if any(row.get(name) is not None for name in _CONVERSATIONS):
            given = row.get("id")
            identity = identity if given is None or given == "" else str(given)
            return reader, {**row, "id": identity, **_shown(row, key, images)}
        caption = row["caption"]
    else:
        caption = _text(key, extension, content, shard)
    where = f"sample `{identity:.200}` of {shard.address}"
    if not caption.strip():
        raise DataError(f"{where}: its caption is empty; remove it, or write one")
    what = "image" if _of_kind("image", images) or not images else "video"
    captioned = _of_kind(what, images)  # beside a picture a video is left out
    if len(captioned) != 1:
        number = len(captioned) or "no"
        raise DataError(f"{where} has {number} {what}s beside its caption; a caption is of one")
    question = questions[crc32(identity.encode("utf-8", "surrogatepass")) % len(questions)]
    turns = [("human", f"{IMAGE}\n{question}"), ("gpt", caption.strip())]
    conversations = [{"from": role, "value": text} for role, text in turns]
    return reader, {"id": identity, what: captioned[0], "conversations": conversations}


def _shown(row: Row, key: str, extensions: Iterable[str]) -> dict[str, Any]:
    """Return what a row shows that names nothing, or as much by other names: that of its key.

    Videos that it does not name are shown where it has their placeholder, or there is no image.
    """
    images, videos = (_of_kind(what, extensions) for what in ("image", "video"))
    found = _taken(row, key, "image", images)
    if videos and (_names(row, "video") or not images or _MARKS.search(json.dumps(row))):
        found |= _taken(row, key, "video", videos)
    return found


def _names(row: Row, what: str) -> list[Any]:
    given = row.get(f"{what}s") if row.get(what) is None else row.get(what)
    return given if isinstance(given, list) else [] if given is None else [given]


def _taken(row: Row, key: str, what: str, extensions: tuple[str, ...]) -> dict[str, Any]:
    names, taken = _names(row, what), {what: None, f"{what}s": [*extensions]}
    if not names:
        return {} if _in_parts(row) or not extensions else taken
    known = [isinstance(name, str) and find_member(name, key, extensions) for name in names]
    if any(known) or len(names) != len(extensions) or not all(isinstance(n, str) for n in names):
        return {}
    return taken


def _in_parts(row: Row) -> bool:
    """Say whether parts of messages name images or videos themselves."""
    said = [rows_of(row.get(name)) for name in ("messages", "prompt", "chosen")]
    for message in (one for some in said if isinstance(some, list) for one in some):
        content = rows_of(message.get("content")) if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            keys = ("image", "video", "url", "path", "base64", "image_url", "video_url")
            if isinstance(part, dict) and any(part.get(name) is not None for name in keys):
                return True
    return False


def _parse(key: str, content: bytes, shard: StoredFile) -> Row:
    member = f"{shard.address}/{key}.json"
    row = parse_json(_text(key, "json", content, shard), member)
    if not isinstance(row, dict):
        raise DataError(f"{member} is no JSON object; a sample is one")
    return row


def _text(key: str, extension: str, content: bytes, shard: StoredFile) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{shard.address}/{key}.{extension} is not UTF-8 text (byte {error.start}); convert it"
        ) from error
