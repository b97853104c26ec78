"""Opens UTF-8 files as people write them: with a byte order mark, or by a wrong path."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import BinaryIO

from llavakit import DataError


def open_text(path: Path) -> BinaryIO:
    """Open a UTF-8 file to read its bytes, behind the byte order mark that some editors write.

    Raises DataError where it cannot be read, or is a folder, a pipe or a device.
    """
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"cannot read {path}: it is no regular file; copy it to one")
        file = path.open("rb")
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
    return file


def read_text(path: Path) -> str:
    """Return what `open_text` opens as text. Raises DataError where it is not UTF-8."""
    try:
        with open_text(path) as file:
            return file.read().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
