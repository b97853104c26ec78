"""Reads files at an offset by system calls, on Windows too, which lacks `os.pread`."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock

# a pipe would keep us waiting; Windows would change line ends
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_moving = Lock()  # a file without `pread` has one position for all threads


def open_file(path: Path | str) -> int:
    """Return the handle of a file to read; close it with `os.close`. Never waits for a pipe."""
    return os.open(path, _FLAGS)


def read_at(handle: int, count: int, start: int) -> bytes:
    """Return `count` bytes from the offset `start`; fewer at the file's end."""
    if hasattr(os, "pread"):
        return os.pread(handle, count, start)
    with _moving:
        os.lseek(handle, start, os.SEEK_SET)
        return os.read(handle, count)
