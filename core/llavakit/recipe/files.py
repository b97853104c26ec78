"""Writes that are whole or not there: a temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any

from llavakit.contracts.errors import LlavaError, ModelError, RecipeError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all. Raises LlavaError where that fails."""
    with new_file(path) as file:
        file.write(text)


@contextmanager
def new_file(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Yield a file to write that becomes `path` when the block ends without an error.

    In text a lone surrogate, which UTF-8 has no place for, is written as JSON's escape for it.
    """
    text: Any = {"mode": "w", "encoding": "utf-8", "errors": "backslashreplace"}
    partial = path.with_name(f".{path.name}.partial")
    with explain_write(path):
        try:
            with partial.open(**({"mode": "wb"} if binary else text)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    What stood at `path` is replaced. On an error nothing is left behind.
    """
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    with explain_write(path):
        for left in (partial, old):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            usual = partial.stat().st_mode & 0o666
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    if not file.is_symlink() and file.stat().st_nlink == 1:
                        with suppress(OSError):  # safetensors makes files for their owner alone
                            file.chmod(usual)
                    sync(file)
            if path.exists():
                path.rename(old)
            partial.rename(path)
            if old.exists():
                shutil.rmtree(old)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that drive a terminal, and halves of characters, which are no text."""


def printable_json(text: str) -> str:
    """Return JSON of the same meaning that drives no terminal."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class JsonLines:
    """A file of JSON objects, one a line, that is only ever appended to.

    The half line that a killed process or a full disk left at its end is cut at the beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explain_write(path):
            with path.open("ab+") as file:
                self._end = size = file.tell()
                if size:  # what is empty cannot be mapped
                    with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                        self._end = data.rfind(b"\n") + 1
                if self._end < size:
                    file.truncate(self._end)
            sync(path.parent)

    def append(self, rows: Iterable[Mapping[str, Any]], *, durable: bool = True) -> list[int]:
        """Add all of these lines or, where the disk is full, none; return where each begins.

        They are on the disk then, where they are to be `durable`: it waits for that.
        """
        texts = (printable_json(json.dumps(row, ensure_ascii=False)) for row in rows)
        lines = [f"{text}\n".encode() for text in texts]
        starts = [*accumulate(map(len, lines), initial=self._end)]
        left = memoryview(b"".join(lines))
        # no buffer: what a full disk refuses must not come later, between other lines
        with explain_write(self.path), self.path.open("ab", buffering=0) as file:
            try:
                while left:
                    left = left[file.write(left) :]
                if durable:
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(self._end)
                raise
        self._end = starts.pop()
        return starts


def link_folder(link: Path, folder: Path) -> None:
    """Make `link` a relative link to a folder beside it, so that both can be moved together."""
    partial = link.with_name(f".{link.name}.partial")
    with explain_write(link):
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder.relative_to(link.parent), target_is_directory=True)
        partial.replace(link)


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Hold a lock that the system releases even when the process is killed, once its forks end.

    Raises RecipeError where another process holds it, and does not end soon.
    """
    from filelock import FileLock, Timeout  # slow to import, and a plan needs no lock

    with explain_write(directory):
        try:
            lock = FileLock(directory / ".lock").acquire(timeout=3)
        except Timeout:
            raise RecipeError(
                f"another llava-run is writing to {directory}; wait for it or use --out"
            ) from None
    with lock:
        yield


@contextmanager
def explain_write(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        rust = "(os error " in str(error)  # tokenizers raises nothing narrower for a full disk
        if isinstance(error, LlavaError) or not (
            rust or isinstance(error, OSError | SafetensorError)
        ):
            raise
        where = (error.filename if isinstance(error, OSError) else None) or path
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise LlavaError(
            f"cannot write {where}: {reason}; free some space or choose another place to write to"
        ) from error


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    if os.name == "nt":  # which opens no folder, and writes out only what is open for writing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


HASHED_BYTES = 1 << 30  #: Larger files take too long to hash: samples of them must do.


def fingerprint(path: Path) -> str:
    """Return what tells a file from another in its place: its hash, if large that of samples."""
    if (size := path.stat().st_size) <= HASHED_BYTES:
        return digest(path)
    samples = sha256(str(size).encode())
    with path.open("rb") as file:
        for begin in range(0, size, max(size >> 10, 1)):  # of 4 kB, four million bytes in all
            file.seek(begin)
            samples.update(file.read(1 << 12))
    return f"{size}-{samples.hexdigest()}"


def differs(path: Path, known: str) -> bool:
    """Say whether a file is not the one of that hash; one too large to be hashed is believed."""
    return path.stat().st_size <= HASHED_BYTES and digest(path) != known


def listed_file(folder: Path, name: str) -> Path:
    """Return a folder's file by its name in a list. Raises ModelError for one that is elsewhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"{folder} lists {name!r:.200}, which is outside of it; refused")
    return folder / name


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def peek_json(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file, empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def without_none(value: Any) -> Any:
    """TOML has no null: an option that is None is its default."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value
