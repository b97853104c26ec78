"""Contexts: the captions and boxes of images, from which a teacher writes data about them.

A file has one JSON object per line, as LLaVA-Bench has it:

`{"id", "image", "captions": [...], "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}`, corners
from 0 to 1.
"""

from __future__ import annotations

import json
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from llavakit import DataError, ImageContext, new_file
from llavakit.contracts.data import Box, is_cut
from llavakit_plugins.datasets.text_files import open_text

_INDEXED = 1000  # contexts from one known offset to the next
_BEYOND = 0.01  # rounding may move a corner out of 0..1 by this much


def to_line(context: ImageContext) -> str:
    """Return one line of the file, with its line end."""
    instances = [{"category": box.category, "bbox": list(box.corners)} for box in context.boxes]
    row = {
        "id": context.id,
        "image": context.image,
        "captions": list(context.captions),
        "instances": instances,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_contexts(path: Path, contexts: Iterable[ImageContext]) -> None:
    """Write a file of contexts, whole or not at all."""
    with new_file(path) as file:
        file.writelines(map(to_line, contexts))


def as_text(context: ImageContext, *, boxes: bool) -> str:
    """Return the context as text for a model without images (arXiv 2304.08485, section 3).

    Captions, one per line; with `boxes`, an empty line and one line for each box, with corners
    rounded to three decimals.
    """
    lines = [caption.strip() for caption in context.captions]
    if boxes and context.boxes:
        lines.append("")
        for box in context.boxes:
            corners = [round(corner, 3) for corner in box.corners]
            lines.append(f"{box.category}: {corners}")
    return "\n".join(lines)


class Contexts(Sequence[ImageContext]):
    """The contexts of a file. They stay on disk; memory holds the offset of one in a thousand.

    Raises DataError if the file cannot be read, and on access to a line that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts, self._numbers = array("Q"), array("Q")
        self._count = 0
        self._file = open_text(path)
        try:
            # not 0: `open_text` has already passed a mark of byte order
            start = self._file.tell()
            for number, line in enumerate(self._file, start=1):
                if _holds_one(line):
                    if self._count % _INDEXED == 0:
                        self._starts.append(start)
                        self._numbers.append(number)
                    self._count += 1
                start += len(line)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        self._next, self._line, self._offset = -1, 0, 0
        """The context behind the one that was read last: its index, and where it may begin."""

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> ImageContext: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageContext]: ...
    def __getitem__(self, index: int | slice) -> ImageContext | list[ImageContext]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(self._count)[index]
        block = index // _INDEXED
        at = self._next
        if not block * _INDEXED <= at <= index:  # else it goes on from the one before
            at, self._line, self._offset = (
                block * _INDEXED, self._numbers[block] - 1, self._starts[block]
            )  # fmt: skip
        self._file.seek(self._offset)
        while True:
            line = self._file.readline()
            self._line += 1
            self._offset += len(line)
            if _holds_one(line):
                at += 1
                if at > index:
                    break
        self._next = at
        where = f"{self._path}:{self._line}"
        try:
            return _parse(line.decode("utf-8-sig"), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 text; convert the file") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _holds_one(line: bytes) -> bool:
    return bool(line.removeprefix(BOM_UTF8).strip())


def read_contexts(path: Path) -> Iterator[ImageContext]:
    """Yield the contexts of a file, line by line.

    Raises DataError, which names the line, for a line that cannot be used.
    """
    contexts = Contexts(path)
    try:
        yield from contexts
    finally:
        contexts.close()


def _parse(line: str, where: str) -> ImageContext:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}:{error.colno}: not valid JSON: {error.msg}; fix or remove the line"
        ) from error
    # Python refuses integers of more than 4,300 digits with a ValueError
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: nested too deeply, or a number too long; fix it") from error
    try:
        captions = tuple(row["captions"]) if isinstance(row["captions"], list) else (None,)
        if not all(isinstance(caption, str) for caption in captions):
            raise TypeError(f"`captions` is no list of texts but {row['captions']!r:.60}")
        boxes = tuple(_box(item, where) for item in row.get("instances", []))
        if not isinstance(row["id"], str | int) or not isinstance(row["image"], str):
            raise TypeError("`id` is a text or a number, `image` a text")
        context = ImageContext(str(row["id"]), row["image"], captions, boxes)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: a context needs `id`, `image`, `captions` and `instances` of `category` "
            f"and `bbox`: {type(error).__name__} {error}"
        ) from error
    words = (context.id, context.image, *captions, *(box.category for box in boxes))
    if any(map(is_cut, words)):
        raise DataError(f"{where}: a text ends within a character (half an emoji); fix it")
    for box in context.boxes:
        if not all(-_BEYOND <= corner <= 1 + _BEYOND for corner in box.corners):
            raise DataError(
                f"{where}: the corners of `{box.category}` are within 0..1, shares of the image's "
                f"width and height, got {list(box.corners)}; divide them by its size"
            )
        left, top, right, bottom = box.corners
        if left > right or top > bottom:
            raise DataError(
                f"{where}: the box of `{box.category}` ends before it begins, {list(box.corners)}; "
                "`bbox` is left, top, right and bottom, not left, top, width and height"
            )
    if not any(map(str.strip, captions)):
        raise DataError(f"{where}: context `{context.id}` has no captions; remove the line")
    return context


def _box(item: Any, where: str) -> Box:
    category, box = item["category"], item["bbox"]
    if not isinstance(category, str):
        raise TypeError(f"`category` is no text but {category!r:.60}")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(type(end) in (int, float) for end in box)
    ):
        raise DataError(f"{where}: a `bbox` has four numbers: x1, y1, x2, y2, got {box!r:.80}")
    left, top, right, bottom = map(float, box)
    return Box(category, (left, top, right, bottom))
