"""Converts COCO's annotations to contexts. Files are read as a stream: they can take 500 MB."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llavakit import DataError, ImageContext, new_file
from llavakit.contracts.data import Box, is_cut
from llavakit_plugins.datasets.json_stream import read_member
from llavakit_plugins.datasets.text_files import open_text
from llavakit_plugins.generation.contexts import to_line

_log = logging.getLogger("llavakit")
_IDS, _SIDES = 1 << 63, 1 << 32  # limits of ids and of sizes in pixels
_FIRST = 1 << 16  # bytes that are read to tell one large JSON object from one object per line


def is_coco(path: Path) -> bool:
    """Return whether a file has COCO's format, and not one JSON object per line."""
    with open_text(path) as file:
        begin = file.read(_FIRST)
    return begin.lstrip()[:1] == b"{" and b'"captions"' not in begin.partition(b"\n")[0]


def convert_coco(captions: Path, instances: Path | None, out: Path) -> None:
    """Write contexts in the order of the captions' images; boxes keep COCO's order.

    Images without captions are left out; their number is logged. A context's id is its image's id,
    with leading zeros as in the file's name (`COCO_val2014_000000000042.jpg`). Corners are 0 to 1,
    rounded to three decimals. Raises DataError if a file is not COCO's, or names an image that it
    does not list.
    """
    image_rows: dict[int, int] = {}
    names: list[str] = []
    sizes = array("I")
    for image in _items(captions, "images"):
        identity = _number(image, "id", captions)
        if identity in image_rows:
            raise DataError(f"{captions}: two images have the id {identity}; give each its own")
        image_rows[identity] = len(names)
        names.append(_text(image, "file_name", captions))
        size = [_number(image, side, captions, _SIDES) for side in ("width", "height")]
        if not all(size):
            raise DataError(f"{captions}: image {identity} is {size[0]}x{size[1]} pixels; fix that")
        sizes.extend(size)
    texts: list[list[str]] = [[] for _ in names]
    for item in _items(captions, "annotations"):
        owner = image_rows.get(_number(item, "image_id", captions))
        if owner is None:
            raise DataError(
                f"{captions}: caption {item.get('id')} is of an image that is not listed"
            )
        if caption := " ".join(_text(item, "caption", captions).split()):
            texts[owner].append(caption)
    if not any(texts):
        raise DataError(f"{captions} holds no captions; is it captions_*.json of COCO?")
    order, which, corners, categories = _boxes(instances, image_rows, sizes)
    # `order` is sorted by image: the boxes of image i are begins[i] to begins[i + 1]
    begins = np.searchsorted(order, np.arange(len(names) + 1))
    with new_file(out) as file:
        for (identity, index), name in zip(image_rows.items(), names, strict=True):
            if not texts[index]:
                continue
            chosen = range(begins[index], begins[index + 1])
            boxes = tuple(Box(categories[which[k]], tuple(corners[k].tolist())) for k in chosen)
            # LLaVA's own files name samples by these digits,
            # zeros included, so that ids can be compared
            spelt = Path(name).stem.rpartition("_")[2]
            same = spelt == str(identity).zfill(len(spelt))
            key = spelt if same else str(identity)
            file.write(to_line(ImageContext(key, name, tuple(texts[index]), boxes)))
    if left_out := texts.count([]):
        _log.warning("note: %d images of %s have no captions: left out", left_out, captions)


def _boxes(
    path: Path | None, image_rows: dict[int, int], sizes: array[int]
) -> tuple[Any, Any, Any, dict[int, str]]:
    """Return image, category and corners `[B, 4]` of all boxes, sorted by image, and the names of
    the categories."""
    # arrays of numbers: a Python object for each of COCO's 860,000 boxes would take gigabytes
    of, which, corners = array("I"), array("Q"), array("d")
    categories: dict[int, str] = {}
    if path is not None:
        for item in _items(path, "categories"):
            categories[_number(item, "id", path)] = _text(item, "name", path)
        for item in _items(path, "annotations"):
            owner = image_rows.get(_number(item, "image_id", path))
            if owner is None:
                continue  # `instances` may hold more images than `captions`
            category = _number(item, "category_id", path)
            if category not in categories:
                raise DataError(
                    f"{path}: box {item.get('id')} is of category {category}, not listed"
                )
            ends = _corners(item, (sizes[2 * owner], sizes[2 * owner + 1]), path)
            of.append(owner)
            which.append(category)
            corners.extend(round(min(1.0, max(0.0, end)), 3) for end in ends)
        if not categories:
            raise DataError(f"{path} lists no categories; is it instances_*.json of COCO?")
    images = np.frombuffer(of, np.uint32) if of else np.zeros(0, np.uint32)
    # stable, so that the boxes of an image keep COCO's order
    order = np.argsort(images, kind="stable")
    table = np.frombuffer(corners, np.float64).reshape(-1, 4) if corners else np.zeros((0, 4))
    kinds = np.frombuffer(which, np.uint64) if which else np.zeros(0, np.uint64)
    return images[order], kinds[order].tolist(), table[order], categories


def _corners(
    item: dict[str, Any], size: tuple[int, int], path: Path
) -> tuple[float, float, float, float]:
    """Return a box's corners as shares of the image's width and height.

    COCO's boxes may leave the image a little; more than its whole size is an error.
    """
    box, where = _field(item, "bbox", path), f"{path}: box {item.get('id')!s:.60}"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DataError(f"{where} has no `bbox` of four numbers, got {box!r:.80}; fix or remove it")
    (left, top, wide, high), (width, height) = box, size
    ends = (left / width, top / height, (left + wide) / width, (top + high) / height)
    if wide < 0 or high < 0 or min(ends) < -1 or max(ends) > 2:
        raise DataError(
            f"{where} lies outside its image of {width}x{height} pixels: `bbox` is left, top, "
            f"width and height, got {box!r:.80}; fix or remove it"
        )
    return ends


def _is_number(value: object) -> bool:
    """Return whether a JSON value may be a coordinate: finite, and not true or false."""
    return type(value) in (int, float) and -1e15 < value < 1e15  # type: ignore[operator]


def _items(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the items of the list `name` of a file, one by one."""
    for row in read_member(path, name):
        if not isinstance(row.value, dict):
            raise DataError(f"{path}: `{name}` holds {row.value!r:.60}, no object")
        yield row.value


def _field(item: dict[str, Any], name: str, path: Path) -> Any:
    if name not in item:
        raise DataError(f"{path}: an entry has no `{name}`: {str(item)[:120]}")
    return item[name]


def _text(item: dict[str, Any], name: str, path: Path) -> str:
    value = _field(item, name, path)
    if not isinstance(value, str):
        raise DataError(f"{path}: `{name}` is {value!r:.60}, no text: {str(item)[:120]}")
    if is_cut(value):
        raise DataError(
            f"{path}: `{name}` of entry {item.get('id')!s:.60} ends within a character (half an "
            "emoji); fix it"
        )
    return value


def _number(item: dict[str, Any], name: str, path: Path, limit: int = _IDS) -> int:
    value = _field(item, name, path)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise DataError(
            f"{path}: `{name}` is {value!r:.60}, no whole number from 0 to {limit - 1}: "
            f"{str(item)[:120]}"
        )
    return value
