"""Writes that are whole or not there: a temporary name, fsync, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from llavakit.errors import LlavaError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all. Raises LlavaError where that fails."""
    partial = path.with_name(f".{path.name}.partial")
    with explain_write(path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    What stood at `path` is replaced. On an error nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    with explain_write(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    sync(file)
            if path.exists():
                old = path.with_name(f".{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
                partial.rename(path)
                shutil.rmtree(old)
            else:
                partial.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def explain_write(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise LlavaError(
            f"cannot write {error.filename or path}: {reason}; free some space or choose another "
            "folder with --out"
        ) from error


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    total = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
