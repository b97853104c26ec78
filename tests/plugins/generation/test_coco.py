"""COCO's annotations, of one's own too: ids, boxes, and what is wrong with them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from llavakit import DataError, ImageContext
from llavakit_plugins.generation.coco import convert_coco, is_coco
from llavakit_plugins.generation.contexts import read_contexts


def table(**changes: Any) -> dict[str, Any]:
    """Return the content of a file that is both of COCO's, for one image of 200 x 100 pixels."""
    made = {
        "info": {"year": 2017},
        "images": [{"id": 7, "file_name": "cat_1.jpg", "width": 200, "height": 100}],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "a cat", "category_id": 3, "bbox": [20, 10, 80, 40]}
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }
    for path, value in changes.items():
        key, _, field = path.partition("__")
        made[key][0][field] = value  # type: ignore[index]
    return made


def convert(folder: Path, content: object, mark: str = "") -> list[ImageContext]:
    path = folder / "coco.json"
    path.write_text(mark + json.dumps(content), encoding="utf-8")
    assert is_coco(path)
    convert_coco(path, path, folder / "out.jsonl")
    return list(read_contexts(folder / "out.jsonl"))


@pytest.mark.parametrize("mark", ["", "\ufeff", "\ufeff\n"])
def test_one_file_gives_captions_and_boxes_with_or_without_a_mark(
    tmp_path: Path, mark: str
) -> None:
    (found,) = convert(tmp_path, table(), mark)
    assert (found.id, found.image, found.captions) == ("7", "cat_1.jpg", ("a cat",))
    assert found.boxes[0].category == "cat"
    assert found.boxes[0].corners == (0.1, 0.1, 0.5, 0.5)


def test_an_image_is_named_by_its_own_id_whatever_its_file_is_called(tmp_path: Path) -> None:
    names = {
        1: "cat_1.jpg", 2: "dog_1.jpg", 3: "a/img.jpg", 4: "b/img.jpg", 5: "5.jpg",
        6: "00000007.jpg", 42: "COCO_val2014_000000000042.jpg", 43: "000000000043.jpg",
        0: "x_.jpg", 8: "x_²8.jpg",
    }  # fmt: skip
    content = table()
    content["images"] = [
        {"id": number, "file_name": name, "width": 9, "height": 9} for number, name in names.items()
    ]
    content["annotations"] = [
        {"id": 1, "image_id": number, "caption": "x", "category_id": 3, "bbox": [0, 0, 1, 1]}
        for number in names
    ]
    found = convert(tmp_path, content)
    expected = {
        1: "1", 2: "2", 3: "3", 4: "4", 5: "5", 6: "6", 42: "000000000042", 43: "000000000043",
        0: "0", 8: "8",
    }  # fmt: skip
    assert {context.image: context.id for context in found} == {
        name: expected[number] for number, name in names.items()
    }


NO_BOXES: list[Any] = [
    [1, 2, 3], [1, 2, 3, None], ["1", "2", "3", "4"], None, "1234", {}, [1, 2, 3, True],
    [1, 2, 3, [4]], [1, 2, 3, 10**400], [1, 2, 3, 1e300],
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images__width": 0}, "image 7 is 0x100 pixels"),
        ({"images__height": 0}, "image 7 is 200x0 pixels"),
        ({"images__width": 5e9}, "`width` is 5000000000.0, no whole number"),
        ({"images__width": 5_000_000_000}, "`width` is 5000000000, no whole number"),
        ({"images__width": None}, "`width` is None"),
        ({"images__width": True}, "`width` is True"),
        ({"images__width": -4}, "`width` is -4"),
        ({"images__id": "7"}, "`id` is '7'"),
        ({"images__file_name": None}, "`file_name` is None, no text"),
        ({"annotations__caption": None}, "`caption` is None, no text"),
        ({"annotations__caption": 5}, "`caption` is 5, no text"),
        ({"annotations__caption": "  "}, "holds no captions"),
        ({"annotations__image_id": 8}, "caption 1 is of an image that is not listed"),
        ({"annotations__category_id": 5}, "box 1 is of category 5, not listed"),
        ({"annotations__category_id": 10**20}, "`category_id` is"),
        ({"categories__name": None}, "`name` is None, no text"),
        ({"annotations__caption": "a cat \ud83d"}, "`caption` of entry 1 ends within a character"),
        ({"images__file_name": "\ud83d.jpg"}, "`file_name` of entry 7 ends within a character"),
        *(
            ({"annotations__bbox": box}, "box 1 has no `bbox` of four numbers")
            for box in NO_BOXES
        ),
        *(
            ({"annotations__bbox": box}, "box 1 lies outside its image of 200x100 pixels")
            for box in ([5e9, 2, 3, 4], [0, 0, 5e9, 4], [-300, 0, 1, 1], [0, 0, -1, 4])
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError) as caught:
        convert(tmp_path, table(**changes))
    assert sentence in str(caught.value)
    assert "coco.json" in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_ids_may_have_63_bits(tmp_path: Path) -> None:
    largest = (1 << 63) - 1
    content = table(images__id=largest, annotations__image_id=largest, categories__id=largest)
    content["annotations"][0]["category_id"] = largest
    (found,) = convert(tmp_path, content)
    assert found.id == str(largest)
    assert found.boxes


def test_two_images_of_one_id_are_refused(tmp_path: Path) -> None:
    content = table()
    content["images"] *= 2
    with pytest.raises(DataError, match="two images have the id 7"):
        convert(tmp_path, content)


def test_a_box_that_reaches_a_little_over_the_edge_is_cut_there(tmp_path: Path) -> None:
    (found,) = convert(tmp_path, table(annotations__bbox=[-2.5, 0, 220.25, 100.4]))
    assert found.boxes[0].corners == (0, 0, 1, 1)
    (found,) = convert(tmp_path, table(annotations__bbox=[20, 10, 0, 0.0]))  # COCO has some
    assert found.boxes[0].corners == (0.1, 0.1, 0.1, 0.1)


def test_deep_nesting_takes_no_memory_by_its_square(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    path.write_text('{"images": [' + "[" * 200_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="nested too deeply"):
        convert_coco(path, None, tmp_path / "out.jsonl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.sampled_from([7, 3, 10**400, 1e308, "\ud83d"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)  # fmt: skip
FIELDS = st.sampled_from(
    ["images__id", "images__width", "images__file_name", "annotations__image_id",
     "annotations__bbox", "annotations__caption", "annotations__category_id", "categories__id",
     "categories__name"]
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(FIELDS, VALUES, max_size=2), VALUES, st.booleans())
def test_any_values_are_contexts_or_a_sentence(
    tmp_path: Path, changes: dict[str, Any], other: Any, more: bool
) -> None:
    content = table(**changes)
    if more:
        content["annotations"].append(other)
    try:
        found = convert(tmp_path, content)
    except DataError as error:
        assert "coco.json" in str(error)  # noqa: PT017
    else:
        assert all(0 <= end <= 1 for box in found[0].boxes for end in box.corners)
