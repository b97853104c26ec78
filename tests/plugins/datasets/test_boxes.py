"""Boxes in answers, moved as padding and cropping move an image: numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llavakit import DataError
from llavakit_plugins.datasets.conversations import Conversations, ConversationsOptions

SAID = "It is at [0.25, 0.5, 0.75, 1.0]."


def read(folder: Path, said: str, size: tuple[int, int], images: int = 1, **options: object) -> str:
    names = [f"{number}.png" for number in range(images)]
    for name in names:
        Image.new("RGB", size).save(folder / name)
    turns = [("human", "<image>\n" * images + "Where is it?"), ("gpt", said)]
    row = {"id": "a", "image": names, "conversations": [{"from": f, "value": v} for f, v in turns]}
    (folder / "rows.json").write_text(json.dumps([row]))
    options = {"path": folder / "rows.json", "images": folder, **options}
    data = Conversations(ConversationsOptions.model_validate(options))
    return data[0].turns[1].text


@pytest.mark.parametrize(("size", "aspect", "expected"), [
    # 200 x 100, padded to 200 x 200: x stays, y becomes (100 y + 50) / 200
    ((200, 100), "pad", "[0.25, 0.50, 0.75, 0.75]"),
    # 100 x 200, padded: y stays, x becomes (100 x + 50) / 200
    ((100, 200), "pad", "[0.38, 0.50, 0.62, 1.00]"),
    # 200 x 100, cropped to the middle 100 x 100: y stays, x becomes (200 x - 50) / 100
    ((200, 100), "crop", "[0.00, 0.50, 1.00, 1.00]"),
    # 100 x 200, cropped: x stays, y becomes (200 y - 50) / 100, cut at 1
    ((100, 200), "crop", "[0.25, 0.50, 0.75, 1.00]"),
    ((100, 100), "pad", "[0.25, 0.50, 0.75, 1.00]"),
    ((200, 100), "squash", "[0.25, 0.5, 0.75, 1.0]"),
])  # fmt: skip
def test_boxes_move_with_the_image(
    size: tuple[int, int], aspect: str, expected: str, tmp_path: Path
) -> None:
    said = read(tmp_path, SAID, size, boxes="normalised", aspect=aspect)
    assert said == f"It is at {expected}."


def test_digits_are_kept_and_nothing_else_is_a_box(tmp_path: Path) -> None:
    said = "[0.123, 0.2, 0.3, 0.4] is no [1, 2, 3, 4], no [0.1, 0.2] and no [0.1, 0.2, 0.3, 1.4]"
    moved = read(tmp_path, said, (200, 100), boxes="normalised", aspect="pad")
    assert moved == said.replace("[0.123, 0.2, 0.3, 0.4]", "[0.123, 0.350, 0.300, 0.450]")


def test_by_default_no_text_is_touched(tmp_path: Path) -> None:
    assert read(tmp_path, SAID, (200, 100)) == SAID


def test_boxes_that_cannot_be_moved_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"sample `a`: nothing of the box \[0.0, 0, 0.2, 1\] is left"
    ):
        read(tmp_path, "[0.0, 0, 0.2, 1]", (200, 100), boxes="normalised", aspect="crop")
    with pytest.raises(DataError, match="`a` has boxes and 2 images"):
        read(tmp_path, SAID, (200, 100), 2, boxes="normalised", aspect="pad")
