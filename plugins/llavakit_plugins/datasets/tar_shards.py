"""Reads tar shards as webdataset writes them: members of one key, side by side, are one sample."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from llavakit import DataError
from llavakit_plugins.datasets.image_files import seems_whole
from llavakit_plugins.datasets.stored_files import StoredFile

TEXTS = ("json", "txt")
"""Extensions of the members that say what a sample is."""
_IMAGES = frozenset(
    ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jfif")
)
_VIDEOS = frozenset(("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg", "ogv", "wmv", "flv"))
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"(.*/)?__[^/]*__", re.DOTALL)  # keys of members about the shard itself
_LONGEST_TEXT = 1 << 26
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_TYPES = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


class Span(NamedTuple):
    """Where a member's bytes are in its shard."""

    start: int
    length: int


@dataclass(frozen=True)
class TarImage:
    """The file of an image or a video in a shard, read when it is opened. Can be pickled."""

    shard: StoredFile
    member: str
    start: int
    length: int

    @property
    def stamp(self) -> str:
        """Is another once the shard was changed."""
        return self.shard.stamp

    def read_bytes(self) -> bytes:
        """Return the whole file. Raises DataError where the shard cannot be read."""
        return self.shard.read(self.start, self.length)

    def read(self, start: int, count: int) -> bytes:
        """Return so many bytes of the file from an offset; fewer at its end."""
        return self.shard.read(self.start + start, max(0, min(count, self.length - start)))

    def __str__(self) -> str:
        return f"{self.shard.address}/{self.member}"


@dataclass
class Group:
    """The members of one key."""

    key: str
    texts: dict[str, bytes] = field(default_factory=dict)
    """What the members of `TEXTS` hold, by extension."""
    images: dict[str, Span] = field(default_factory=dict)
    """And videos; by extension, in the order of the shard."""
    spans: dict[str, Span] = field(default_factory=dict)
    """Of all members, by extension."""
    whole: set[str] = field(default_factory=set)
    """Extensions of the images whose beginning and end are those of a usable one."""
    fault: str = ""
    """What is wrong with its members, if anything."""

    def blame(self, fault: str) -> None:
        """Note what is wrong; the first counts."""
        self.fault = self.fault or fault


def read_groups(shard: StoredFile) -> Iterator[Group]:
    """Yield the groups of a shard that have an image, a video or a text, in order.

    Raises DataError, which names the shard and as a rule the member, where it is damaged, cut off,
    compressed, or no tar; a group whose members cannot be used says so itself.
    """
    count = 0
    with shard.open() as file:
        _refuse_compressed(file, shard)
        for group in _groups(file, shard):
            if group.spans:
                count += 1
                yield group
    if not count:
        raise DataError(
            f"{shard.address} holds no samples: no image, video, `json` or `txt`; check what it is"
        )


def _groups(file: BinaryIO, shard: StoredFile) -> Iterator[Group]:
    keys: set[int] = set()  # hashes take a third of the texts' room
    group = None
    for member in _members(file, shard):
        found = _KEY.fullmatch(member.name)
        if member.isdir() or found is None or _META.fullmatch(found[1]):
            continue
        key, extension = found[1], found[2].lower()
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = Group(key)
            if hash(key) in keys:
                group.blame(
                    f"key `{key:.200}` is there again, apart from its first members; those of one "
                    "key lie side by side: write the shard anew, sorted by name"
                )
            keys.add(hash(key))
        _add(group, member, extension, file)
    if group is not None:
        yield group


class _Member(NamedTuple):
    """A member of an open shard, as `seems_whole` reads it."""

    file: BinaryIO
    start: int
    length: int

    def read(self, start: int, count: int) -> bytes:
        self.file.seek(self.start + start)
        return self.file.read(max(0, min(count, self.length - start)))


def is_image(extension: str) -> bool:
    """Say whether a member's extension, such as `jpg` or `0.jpg`, is an image's."""
    return extension.rpartition(".")[2] in _IMAGES


def is_video(extension: str) -> bool:
    """Say whether a member's extension is a video's."""
    return extension.rpartition(".")[2] in _VIDEOS


def _add(group: Group, member: tarfile.TarInfo, extension: str, file: BinaryIO) -> None:
    """Add a member to its group, where it is an image, a video or a text."""
    if not (is_image(extension) or is_video(extension) or extension in TEXTS):
        return
    name = f"member `{member.name:.200}`"
    if extension in group.spans:
        group.blame(f"{name} is there twice; keep one of it")
        return
    group.spans[extension] = Span(member.offset_data, member.size)
    if not member.isreg() or member.issparse():
        what = "a sparse file" if member.issparse() else _TYPES.get(member.type, "no file")
        group.blame(f"{name} is {what}; shards hold plain files (`tar --dereference`)")
        return
    if PurePosixPath(member.name).is_absolute() or ".." in PurePosixPath(member.name).parts:
        group.blame(f"{name} leaves the folder; write the shard from within its folder")
    if extension not in TEXTS:
        group.images[extension] = group.spans[extension]
        # now, while the shard is read from its beginning to its end
        if is_image(extension) and seems_whole(_Member(file, *group.spans[extension])):
            group.whole.add(extension)
    elif member.size > _LONGEST_TEXT:
        group.blame(f"{name} has more than {_LONGEST_TEXT >> 20} MB of text; split it")
    else:
        file.seek(member.offset_data)
        group.texts[extension] = file.read(member.size)


def _members(file: BinaryIO, shard: StoredFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar. Raises DataError where it is damaged or cut off."""
    end, last = 0, ""
    file.seek(0)
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closing it closes nothing
    except DataError:
        raise
    except Exception as error:  # headers may say whatever Python cannot hold or count
        raise DataError(f"{shard.address} is no tar file ({_reason(error)}); {_AGAIN}") from error
    while True:
        try:
            member = archive.next()
        except DataError:
            raise
        except Exception as error:
            raise _damaged(shard, end, last, _reason(error)) from error
        if member is None:
            break
        archive.members.clear()  # type: ignore[attr-defined]  # or they fill the memory
        if member.offset < end or member.size < 0:
            raise _damaged(shard, end, last, "its headers run backwards")
        end = -(-(member.offset_data + member.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if end > shard.size and not member.issparse():
            raise DataError(
                f"{shard.address} is cut off within member `{member.name:.200}`: it has "
                f"{shard.size:,} bytes; {_AGAIN}"
            )
        yield member
        last = member.name
    _check_end(file, archive.offset, last, shard)


_AGAIN = "fetch or write it again"


def _check_end(file: BinaryIO, end: int, last: str, shard: StoredFile) -> None:
    """Raise DataError where a tar ends in another way than with blocks of zeros.

    Python's tarfile takes a damaged header for the end, and all behind it would be missing.
    """
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(
            f"{shard.address} ends behind member `{last:.200}` without the mark of a tar's end: it "
            f"was cut off, or is still being written; {_AGAIN}"
        )
    if block.strip(b"\0"):
        raise _damaged(shard, end, last, "no header of a member")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise DataError(
                f"{shard.address} goes on behind its end, as if shards were joined by `cat`; keep "
                "them apart, or join them with `tar --concatenate`"
            )


def _damaged(shard: StoredFile, byte: int, last: str, reason: str) -> DataError:
    where = f"behind member `{last:.200}` (byte {byte:,})" if last else "at its beginning"
    return DataError(f"{shard.address} is damaged {where}: {reason}; {_AGAIN}")


def _reason(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.200}"


def _refuse_compressed(file: BinaryIO, shard: StoredFile) -> None:
    head = file.read(8)
    for magic, (kind, tool) in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"{shard.address} is compressed ({kind}), so that no member can be read alone; "
                f"unpack it with `{tool}` (images are compressed as they are)"
            )
