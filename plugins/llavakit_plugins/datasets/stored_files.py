"""Data files by their names: braces and globs, on this machine or wherever fsspec reads."""

from __future__ import annotations

import glob
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from llavakit import DataError, and_more
from llavakit_plugins.datasets.offsets import open_file, read_at

_ELSEWHERE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*(?:://|::)")
_BRACES = re.compile(r"\{(\d+\.\.\d+(?:\.\.\d+)?|[^{}]*,[^{}]*)\}")
_GLOB = re.compile(r"[*?\[]")
_MOST = 1_000_000  # names: a slip in a range must not fill the memory
_AT_ONCE = 16  # questions to a server
_BLOCK = 1 << 22  # bytes that are fetched at once of a file that is read from beginning to end
_PAUSES = (1.0, 4.0)  # seconds before a read over a network is tried again
_STAMPS = ("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime", "created",
           "updated", "md5Hash", "Content-MD5")  # fmt: skip
"""What the file systems call that which changes with a file."""


class UnreadFile(DataError):
    """A file could not be read, this time: that says nothing about what it holds."""


def is_elsewhere(name: str) -> bool:
    """Say whether a name is an address that fsspec reads, such as `s3://bucket/a.tar`."""
    return _ELSEWHERE.match(name) is not None and not name.startswith("file://")


def is_pattern(name: str) -> bool:
    """Say whether a name stands for several files: it has braces or stars, and is none itself."""
    special = _GLOB.search(name) or _BRACES.search(name)
    return special is not None and not os.path.lexists(name)


@dataclass(frozen=True)
class StoredFile:
    """A file, here or elsewhere, of which stretches are read. Can be pickled."""

    address: str
    size: int
    stamp: str
    """Is another once the file was changed, as far as its file system tells."""
    storage: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.address.rpartition("/")[2]

    def read(self, start: int, count: int) -> bytes:
        """Return `count` bytes from an offset. Raises DataError where they cannot be had."""
        count = max(0, min(count, self.size - start))
        if not count:
            return b""
        fetch = self._fetch if is_elsewhere(self.address) else self._pread
        data = fetch(start, count)
        if len(data) > count:
            raise UnreadFile(
                f"{self.address}: its server sends whole files where a part is asked for; copy "
                "the file, or use a server that knows byte ranges"
            )
        if len(data) < count:
            raise UnreadFile(
                f"{self.address} is shorter than it was ({start + len(data):,} of {self.size:,} "
                "bytes); it must stay as it is while it is in use"
            )
        return data

    def seen_here(self) -> StoredFile:
        """Return the file as this machine has it. Raises DataError where it is another one."""
        if is_elsewhere(self.address):
            return self
        (found,) = find_files((self.address,), self.storage)
        if found.size != self.size:
            raise UnreadFile(
                f"{self.address} has {found.size:,} bytes on one machine and {self.size:,} on "
                "another; all need the same shards"
            )
        return found

    def open(self) -> BinaryIO:
        """Return the file, to be read from its beginning on, with few requests."""
        if is_elsewhere(self.address):
            return BufferedReader(_Raw(self), _BLOCK)
        try:
            return Path(self.address).open("rb")
        except OSError as error:
            raise UnreadFile(f"cannot read {self.address}: {error.strerror}") from error

    def _pread(self, start: int, count: int) -> bytes:
        try:
            handle = open_file(self.address)
            try:
                if _stamp_of(os.fstat(handle)) != self.stamp:
                    raise UnreadFile(f"{self.address} was changed while it was in use; run again")
                return read_at(handle, count, start)
            finally:
                os.close(handle)
        except OSError as error:
            raise UnreadFile(f"cannot read {self.address}: {error.strerror}") from error

    def _fetch(self, start: int, count: int) -> bytes:
        for pause in (*_PAUSES, None):
            try:
                # asked for each time: a file system belongs to its process, and fsspec keeps it
                system, path = _system(self.address, self.storage)
                return bytes(system.cat_file(path, start=start, end=start + count))
            except DataError:
                raise
            except Exception as error:  # each file system has errors of its own
                lasting = isinstance(error, FileNotFoundError | PermissionError | ValueError)
                if pause is None or lasting:
                    raise _unread(self.address, error) from error
                time.sleep(pause)
        raise AssertionError


class _Raw(RawIOBase):
    """A stored file as Python's buffers read one."""

    def __init__(self, file: StoredFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def find_files(names: Sequence[str], storage: Mapping[str, Any]) -> list[StoredFile]:
    """Return the files that names, braces and globs stand for, in order, each once.

    Braces are those of shells: `{000..012}`, `{0..10..2}`, `{a,b}`; what a glob finds is sorted.
    Raises DataError where there are none, or some are missing.
    """
    found: dict[str, None] = {}
    for name in names:
        for one in list(expand_braces(name.removeprefix("file://"))):  # too many: before any look
            found.update(dict.fromkeys(_expand_glob(one, storage)))
    addresses = list(found)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="stored-files") as pool:
        files = list(pool.map(lambda address: _look_at(address, storage), addresses))
    missing = [a for a, file in zip(addresses, files, strict=True) if file is None]
    if missing:
        what = f"{len(missing)} of {len(files)} files do" if len(files) > 1 else "the file does"
        raise DataError(f"{what} not exist: {and_more(missing)}; check `path`")
    return [file for file in files if file is not None]


def expand_braces(name: str) -> Iterator[str]:
    """Yield what a name with braces stands for. Raises DataError for far too many."""
    for number, one in enumerate(_expanded(name)):
        if number == _MOST:
            raise DataError(f"{name:.200} stands for more than {_MOST:,} files; check its braces")
        yield one


def _expanded(name: str) -> Iterator[str]:
    found = _BRACES.search(name)
    if found is None:
        yield name
        return
    for choice in _choices(found[1]):
        yield from _expanded(f"{name[: found.start()]}{choice}{name[found.end() :]}")


def _choices(inside: str) -> Iterable[str]:
    if "," in inside:
        return inside.split(",")
    first, last, *steps = inside.split("..")
    step = max(1, int(steps[0])) if steps else 1
    width = max(len(first), len(last)) if "0" in (first[:-1][:1], last[:-1][:1]) else 0
    begin, end = int(first), int(last)
    numbers = range(begin, end + 1, step) if begin <= end else range(begin, end - 1, -step)
    return (f"{number:0{width}}" for number in numbers)


def _expand_glob(name: str, storage: Mapping[str, Any]) -> list[str]:
    if not _GLOB.search(name):
        return [name]
    if not is_elsewhere(name):
        found = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
    else:
        chain, _, address = name.rpartition("::")  # `simplecache::s3://...`
        system, path = _system(address, storage)
        try:
            paths = sorted(map(str, system.glob(path)))
        except Exception as error:
            raise _unread(name, error) from error
        # as braces would name them: what stands in front of a path is not the same in all systems
        front = address.removesuffix(path.lstrip("/"))
        found = [f"{chain}::" * bool(chain) + front + p.lstrip("/") for p in paths]
    if not found:
        raise DataError(f"no file fits {name}; check `path`")
    return found


def _look_at(address: str, storage: Mapping[str, Any]) -> StoredFile | None:
    """Return a file with its size; None where there is none."""
    if not is_elsewhere(address):
        try:
            state = os.stat(address)
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
                return None
            raise DataError(f"cannot read {address}: {error.strerror}") from error
        if not stat.S_ISREG(state.st_mode):
            what = "a folder" if stat.S_ISDIR(state.st_mode) else "a device or a pipe"
            raise DataError(f"{address} is {what}; name its files, such as `{address}/*.tar`")
        return StoredFile(address, state.st_size, _stamp_of(state), storage)
    system, path = _system(address, storage)
    try:
        facts = system.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__  # over http, whatever went wrong
        known = cause is None or not type(cause).__module__.startswith("aiohttp")
        if known or getattr(cause, "status", 0) in (404, 410):
            return None
        raise _unread(address, cause or error) from error
    except Exception as error:
        raise _unread(address, error) from error
    if facts.get("type") == "directory":
        raise DataError(f"{address} is a folder; name its files, such as `{address}/*.tar`")
    if not isinstance(facts.get("size"), int):
        raise DataError(f"{address}: its server does not say how large it is; copy the file")
    stamp = ";".join(f"{name}={facts[name]}" for name in _STAMPS if facts.get(name))
    return StoredFile(address, facts["size"], stamp, storage)


def _stamp_of(state: os.stat_result) -> str:
    return f"{state.st_size};{state.st_mtime_ns}"


def _system(address: str, storage: Mapping[str, Any]) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it."""
    from fsspec import __version__, asyn
    from fsspec.core import url_to_fs

    if not hasattr(asyn, "reset_after_fork"):  # the processes that read ahead would wait for ever
        raise DataError(
            f"{address} cannot be read by several processes with fsspec {__version__}; "
            "pip install --upgrade 'llavakit[fsspec]'"
        )
    try:
        system, path = url_to_fs(address, **storage)
    except ImportError as error:
        raise DataError(
            f"{address} needs a package: {' '.join(str(error).split()):.200}; for http and https "
            "pip install 'llavakit[fsspec]'"
        ) from error
    except Exception as error:
        raise _unread(address, error) from error
    return system, str(path)


def _unread(address: str, error: BaseException) -> UnreadFile:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UnreadFile(
        f"cannot read {address}: {reason:.300}; check the address, `storage` and the network"
    )
