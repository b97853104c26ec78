"""COCO's annotations as contexts: read as a stream, since a file of them can be half a gigabyte."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llavakit import DataError, ImageContext, new_file
from llavakit.contracts.data import Box
from llavakit_plugins.generation.contexts import to_line

_log = logging.getLogger("llavakit")
_FIRST = 1 << 16  # bytes by which a file of one JSON is told from one of a JSON a line


def is_coco(path: Path) -> bool:
    """Say whether a file is in COCO's format, and not one JSON object a line."""
    try:
        with path.open("rb") as file:
            begin = file.read(_FIRST)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return begin.lstrip()[:1] == b"{" and b'"captions"' not in begin.partition(b"\n")[0]


def convert_coco(captions: Path, instances: Path | None, out: Path) -> None:
    """Write contexts, in the order of the captions' images; boxes keep COCO's order.

    Images without captions are left out, and how many is logged. Corners are within 0..1, rounded
    to three decimals. Raises DataError where a file is not COCO's, or speaks of an image that it
    does not list.
    """
    places: dict[int, int] = {}
    names: list[str] = []
    sizes = array("I")
    for image in _items(captions, "images"):
        places[_number(image, "id", captions)] = len(names)
        names.append(str(_field(image, "file_name", captions)))
        sizes.extend((_number(image, "width", captions), _number(image, "height", captions)))
    texts: list[list[str]] = [[] for _ in names]
    for item in _items(captions, "annotations"):
        place = places.get(_number(item, "image_id", captions))
        if place is None:
            raise DataError(
                f"{captions}: caption {item.get('id')} is of an image that is not listed"
            )
        texts[place].append(" ".join(str(_field(item, "caption", captions)).split()))
    if not any(texts):
        raise DataError(f"{captions} holds no captions; is it captions_*.json of COCO?")
    order, which, corners, categories = _boxes(instances, places, sizes)
    begins = np.searchsorted(order, np.arange(len(names) + 1))
    with new_file(out) as file:
        for index, name in enumerate(names):
            if not texts[index]:
                continue
            chosen = range(begins[index], begins[index + 1])
            boxes = tuple(Box(categories[which[k]], tuple(corners[k].tolist())) for k in chosen)
            context = ImageContext(
                Path(name).stem.rpartition("_")[2], name, tuple(texts[index]), boxes
            )
            file.write(to_line(context))
    if left_out := texts.count([]):
        _log.warning("note: %d images of %s have no captions: left out", left_out, captions)


def _boxes(
    path: Path | None, places: dict[int, int], sizes: array[int]
) -> tuple[Any, Any, Any, dict[int, str]]:
    """Return image, category and corners `[B, 4]` of every box, by image; and categories' names."""
    of, which, corners = array("I"), array("I"), array("d")
    categories: dict[int, str] = {}
    if path is not None:
        for item in _items(path, "categories"):
            categories[_number(item, "id", path)] = str(_field(item, "name", path))
        for item in _items(path, "annotations"):
            place = places.get(_number(item, "image_id", path))
            if place is None:
                continue  # of a split that is not captioned here
            category = _number(item, "category_id", path)
            if category not in categories:
                raise DataError(
                    f"{path}: box {item.get('id')} is of category {category}, not listed"
                )
            box = _field(item, "bbox", path)
            if not isinstance(box, list) or len(box) != 4:
                raise DataError(f"{path}: box {item.get('id')} has no `bbox` of four numbers")
            left, top, wide, high = map(float, box)
            width, height = sizes[2 * place], sizes[2 * place + 1]
            ends = (left / width, top / height, (left + wide) / width, (top + high) / height)
            of.append(place)
            which.append(category)
            corners.extend(round(min(1.0, max(0.0, end)), 3) for end in ends)
        if not categories:
            raise DataError(f"{path} lists no categories; is it instances_*.json of COCO?")
    images = np.frombuffer(of, np.uint32) if of else np.zeros(0, np.uint32)
    order = np.argsort(images, kind="stable")
    table = np.frombuffer(corners, np.float64).reshape(-1, 4) if corners else np.zeros((0, 4))
    kinds = np.frombuffer(which, np.uint32) if which else np.zeros(0, np.uint32)
    return images[order], kinds[order].tolist(), table[order], categories


def _items(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the items of one list of a file, one by one."""
    try:
        import ijson
    except ImportError as error:
        raise DataError(
            f"reading COCO's {path} needs `ijson`: pip install 'llavakit[openai]'"
        ) from error
    try:
        with path.open("rb") as file:
            for item in ijson.items(file, f"{name}.item", use_float=True):
                if not isinstance(item, dict):
                    raise DataError(f"{path}: `{name}` holds {item!r:.60}, no object")
                yield item
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ijson.JSONError as error:
        reason = str(error).partition("\n")[0].rstrip(".")  # a picture of the place follows
        raise DataError(f"{path} is not valid JSON: {reason}; fetch it again") from error


def _field(item: dict[str, Any], name: str, path: Path) -> Any:
    if name not in item:
        raise DataError(f"{path}: an entry has no `{name}`: {str(item)[:120]}")
    return item[name]


def _number(item: dict[str, Any], name: str, path: Path) -> int:
    value = _field(item, name, path)
    if not isinstance(value, int) or value < 0:
        raise DataError(f"{path}: `{name}` is {value!r}, no whole number: {str(item)[:120]}")
    return value
