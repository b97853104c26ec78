"""Makes samples in LLaVA's JSON format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llavakit import ImageContext, Turn
from llavakit.contracts.data import IMAGE

BRIEF = (
    "Describe the image briefly.",
    "What is shown here, in one sentence?",
    "Give a short caption for this image.",
    "Sum up the image.",
)
"""Questions of stage 1 for a small language model; `brief_questions` returns all of them."""

ItemT = TypeVar("ItemT")
Row = Mapping[str, Any]
"""A sample in LLaVA's JSON format."""


def row_of(context: ImageContext, kind: str, turns: Sequence[Turn]) -> Row:
    """Return a sample in LLaVA's JSON format."""
    conversations = [{"from": turn.role, "value": turn.text} for turn in turns]
    return {
        "id": f"{context.id}-{kind}",
        "image": context.image,
        "conversations": conversations,
    }


def caption_row(context: ImageContext, draw: np.random.Generator, questions: Sequence[str]) -> Row:
    """Return a sample of stage 1: a brief question and one of the captions."""
    # one caption of COCO's five: stage 1 sees each image once
    question, answer = pick(draw, questions), pick(draw, context.captions)
    turns = (Turn("human", f"{IMAGE}\n{question}"), Turn("gpt", answer))
    return row_of(context, "caption", turns)


def pick(draw: np.random.Generator, items: Sequence[ItemT]) -> ItemT:
    """Return one of the items, the one that `draw.choice` picks, which makes an array of them."""
    return items[int(draw.integers(len(items)))]


def brief_questions() -> tuple[str, ...]:
    """Return the questions of stage 1: table 11 of arXiv 2304.08485 in our own words."""
    text = files("llavakit_plugins.generation").joinpath("brief.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def find_image(images: Path | None, context: ImageContext) -> Path | None:
    """Return the file of a context's image, or None if there is none."""
    from llavakit_plugins.datasets.image_files import inside

    if images is None:
        return None
    found = inside(images, context.image, context.id)
    return found if found.is_file() else None
