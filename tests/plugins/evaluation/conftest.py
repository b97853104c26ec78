"""ScienceQA in small, made here, and the published files, where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests import published
from tests.conftest import llava_run, refused

__all__ = ["llava_run", "refused"]  # fixtures, for the tests here, too

PROBLEMS: dict[str, dict[str, Any]] = {
    "7": {
        "question": "What is ice?", "choices": ["a gas", "a solid"], "answer": 1,
        "hint": "", "image": "image.png", "task": "closed choice", "grade": "grade3",
        "subject": "natural science", "lecture": "Solids keep  their shape.",
        "solution": "Ice keeps its shape.", "split": "train",
    },
    "9": {
        "question": "Where is Oslo?", "choices": ["Norway", "Peru", "Chad"], "answer": 0,
        "hint": "Oslo is in Europe.", "image": None, "task": "closed choice", "grade": "grade7",
        "subject": "social science", "lecture": "", "solution": "", "split": "train",
    },
    "12": {
        "question": "Which word is a noun?", "choices": ["run", "cat"], "answer": 1, "hint": "",
        "image": None, "task": "closed choice", "grade": "grade6", "subject": "language science",
        "lecture": "A noun names a thing.", "solution": "A cat is a thing.", "split": "test",
    },
    "13": {
        "question": "Is a bat a bird?", "choices": ["yes", "no"], "answer": 1,
        "hint": "Bats have fur.", "image": "image.png", "task": "closed choice",
        "grade": "grade12", "subject": "natural science", "lecture": "", "solution": "",
        "split": "test",
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published files, or of our own in their formats."""
    return published.folder()


@pytest.fixture
def science(tmp_path: Path) -> Path:
    """A folder with `problems.json` and images as ScienceQA is released: `SPLIT/ID/image.png`."""
    folder = tmp_path / "scienceqa"
    for number, (identity, row) in enumerate(PROBLEMS.items()):
        if row["image"]:
            place = folder / row["split"] / identity
            place.mkdir(parents=True)
            Image.new("RGB", (20, 24), (40 * number, 90, 200)).save(place / "image.png")
    (folder / "problems.json").write_text(json.dumps(PROBLEMS))
    return folder
