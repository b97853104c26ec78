"""Boxes in a conversation's text, moved to where an image's parts are once it is a square.

A box is `[left, top, right, bottom]`, each from 0 to 1, of the image as it is in its file. Padding
an image to a square shrinks it within the new frame; cutting the middle square out moves the rest.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from llavakit import DataError, Sample, image_size

Aspect = Literal["squash", "crop", "pad"]

_NUMBER = r"\s*(0(?:\.\d+)?|1(?:\.0+)?|\.\d+)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def with_moved_boxes(sample: Sample, aspect: Aspect) -> Sample:
    """Return a sample whose boxes are those of the square that an encoder sees.

    Raises DataError for boxes in a sample of several images, of which it cannot be said which
    they are in, and for one of which a crop leaves nothing.
    """
    found = any(_BOX.search(turn.text) for turn in sample.turns)
    if not found or aspect == "squash" or not sample.images:
        return sample
    where = f"sample `{sample.id:.200}`"
    if len(sample.images) > 1:
        raise DataError(
            f"{where} has boxes and {len(sample.images)} images: it is open in which they are; "
            'leave it out, or set boxes = "none"'
        )
    width, height = image_size(sample.images[0], where)
    turns = tuple(
        turn._replace(
            text=_BOX.sub(lambda box: _moved(box, width, height, aspect, where), turn.text)
        )
        for turn in sample.turns
    )
    return replace(sample, turns=turns)


def _moved(box: re.Match[str], width: int, height: int, aspect: Aspect, where: str) -> str:
    edge = max(width, height) if aspect == "pad" else min(width, height)
    sides = (width, height, width, height)
    moved = [
        min(max((float(number) * side + (edge - side) / 2) / edge, 0.0), 1.0)
        for number, side in zip(box.groups(), sides, strict=True)
    ]
    if not (moved[0] < moved[2] and moved[1] < moved[3]):
        raise DataError(
            f"{where}: nothing of the box {box[0]} is left once the image is cropped; leave it "
            'out, or use an encoder with aspect = "pad"'
        )
    digits = max(len(number.partition(".")[2]) for number in box.groups())
    return "[" + ", ".join(f"{number:.{max(2, digits)}f}" for number in moved) + "]"
