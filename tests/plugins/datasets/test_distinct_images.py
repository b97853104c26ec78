"""Images of many rows are looked at once each, in blocks, and take few bytes of memory."""

from __future__ import annotations

import gc
import json
import threading
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from llavakit import DataError, Dataset, Registry, Use, open_image
from llavakit_plugins.datasets import distinct_images
from llavakit_plugins.datasets.distinct_images import DistinctHashes


def build(path: Path, unusable: str = "refuse", progress: Any = lambda *_: None) -> Dataset:
    use = Use[Dataset].model_validate(
        {"use": "conversations", "path": str(path), "unusable": unusable}
    )
    return Registry.installed().build(use, progress=progress)


def write(folder: Path, images: list[list[str]]) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number, names in enumerate(images):
            question = {"from": "human", "value": "<image>" * len(names) + "what ?"}
            turns = [question, {"from": "gpt", "value": "red ."}]
            row = {"id": f"s{number}", "image": names, "conversations": turns}
            file.write(json.dumps(row) + "\n")
    return path


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(-40, 40) | st.integers(-(2**63), 2**63 - 1), unique=True)))
def test_hashes_are_known_again(batches: list[list[int]]) -> None:
    known: set[int] = set()
    with patch.object(distinct_images, "_LARGEST", 32):
        hashes = DistinctHashes()
        for batch in batches:
            found = hashes.add(np.array(batch, np.int64))
            assert found.tolist() == [number not in known for number in batch]
            known.update(batch)


IMAGES = [
    ["a.png", "gone0.png"],
    ["a.png"],
    ["gone0.png", "cut.png", "gone0.png"],
    ["gone1.png"],
    ["b.png", "cut.png"],
    ["gone2.png", "gone3.png"],
    ["b.png", "a.png"],
    ["gone1.png"],
]


@pytest.mark.parametrize("at_once", [1, 2, 3, 4096])
def test_blocks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(distinct_images, "_AT_ONCE", at_once)
    for name in "ab":
        Image.effect_noise((20, 20), 50).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    path = write(tmp_path, IMAGES)
    with pytest.raises(DataError) as caught:
        build(path)
    # threads that garbage collection ends may wait for each other without end
    assert not [thread for thread in threading.enumerate() if "whole-images" in thread.name]
    named = [(0, "s0"), (1, "s3"), (2, "s5")]
    names = ", ".join(f"{tmp_path / f'gone{at}.png'} (sample `{row}`)" for at, row in named)
    assert str(caught.value) == (
        f"{path}: 4 of 7 images are missing: {names} and 1 more; check the images folder, "
        'or set unusable = "skip" to leave their samples out'
    )
    data = build(path, "skip")
    assert [sample.id for sample in data] == ["s1", "s6"]
    (note,) = data.notes()
    assert note.startswith(
        f"{path}: 6 of 8 samples are left out: image {tmp_path / 'gone0.png'} of "
    )
    assert note.index("gone0.png") < note.index("cut.png") < note.index("gone1.png")
    assert note.count("sample `") == 3
    assert note.endswith("; and 2 more")


def test_paths_of_one_hash_are_caught_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distinct_images, "_AT_ONCE", 1)
    monkeypatch.setattr(distinct_images, "hash", lambda _: 7, raising=False)
    Image.effect_noise((20, 20), 50).save(tmp_path / "a.png")
    data = build(write(tmp_path, [["a.png"], ["gone.png"]]))
    (image,) = data[1].images
    with pytest.raises(DataError, match=r"gone\.png of sample `s1` does not exist"):
        open_image(image, "sample `s1`")


def growth(folder: Path, counts: tuple[int, int], missing: bool) -> float:
    """Return the bytes that a row with an image of its own takes at the end of the check."""

    def held(count: int) -> int:
        found = 0

        def progress(done: int, total: int, note: str = "") -> None:
            nonlocal found
            if note.startswith("images looked at") and total - done <= 256:
                gc.collect()
                # pathlib interns names, in a table of all of Python's that grows by leaps
                snapshot = tracemalloc.take_snapshot()
                others = snapshot.filter_traces([tracemalloc.Filter(False, "*pathlib*")])
                found = sum(entry.size for entry in others.statistics("filename"))

        path = write(folder, [[f"train2017/{number:012}.jpg"] for number in range(count)])
        refused = pytest.raises(DataError, match=f": {count} of {count} images are missing")
        tracemalloc.start()
        with refused if missing else nullcontext():
            build(path, progress=progress)
        tracemalloc.stop()
        return found

    held(1)  # what is imported and kept once
    few, many = map(held, counts)
    return (many - few) / (counts[1] - counts[0])


def test_an_image_takes_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavakit_plugins.datasets.image_files._seems_whole", lambda _: True)
    monkeypatch.setattr(distinct_images, "_AT_ONCE", 512)
    # 12 for where the row lies, 8 for the image, and what arrays keep in reserve
    assert growth(tmp_path, (2_000, 12_000), missing=False) < 30


def test_missing_images_take_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct_images, "_AT_ONCE", 256)
    assert growth(tmp_path, (1_000, 4_000), missing=True) < 50
