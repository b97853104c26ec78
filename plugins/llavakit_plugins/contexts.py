"""Reads and writes what a teacher is told of images: one JSON object a line, as LLaVA-Bench has it.

`{"id", "image", "captions": [...], "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}`, corners
within 0..1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from llavakit import DataError, ImageContext
from llavakit.samples import Box


def to_line(context: ImageContext) -> str:
    """Return one line of the file, its end included."""
    instances = [{"category": box.category, "bbox": list(box.corners)} for box in context.boxes]
    row = {
        "id": context.id,
        "image": context.image,
        "captions": list(context.captions),
        "instances": instances,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_contexts(path: Path, contexts: Iterable[ImageContext]) -> None:
    """Write a file of contexts."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(to_line, contexts))


def read_contexts(path: Path) -> Iterator[ImageContext]:
    """Yield the contexts of a file, line by line.

    Raises DataError naming the line that cannot be used.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error


def _parse(line: str, where: str) -> ImageContext:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}:{error.colno}: not valid JSON: {error.msg}; mend or remove the line"
        ) from error
    try:
        boxes = tuple(
            Box(str(item["category"]), tuple(map(float, item["bbox"])))  # type: ignore[arg-type]
            for item in row.get("instances", [])
        )
        captions = tuple(map(str, row["captions"]))
        context = ImageContext(str(row["id"]), str(row["image"]), captions, boxes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: a context needs `id`, `image`, `captions` and `instances` of `category` "
            f"and `bbox`: {type(error).__name__} {error}"
        ) from error
    if any(len(box.corners) != 4 for box in context.boxes):
        raise DataError(f"{where}: a `bbox` has four numbers: x1, y1, x2, y2")
    return context
