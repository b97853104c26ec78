"""The built-in data sets: what they make of rows, and what they hold in memory."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from PIL import Image
from pydantic import ValidationError

from llavakit import DataError, Dataset, Registry, Use


def build(**options: Any) -> Dataset:
    return Registry.installed().build(Use[Dataset](**options))


def row(identity: object, image: object = None, question: str = "what ?") -> dict[str, Any]:
    made: dict[str, Any] = {} if identity is None else {"id": identity}
    if image is not None:
        made["image"] = image
        marks = len(image) if isinstance(image, list) else 1
        question = "<image>" * marks + question
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red ."}]
    return {**made, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abc":
        Image.effect_noise((20, 20), 50).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, rows: list[Any], name: str = "rows.json") -> Path:
    path = folder / name
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_of_every_sort(folder: Path, name: str) -> None:
    rows = [
        row("one", "a.png"),
        row("two", ["b.png", "a.png"]),
        {**row("text"), "model": "gpt-4"},
        {**row("empty"), "image": None},
        row(12),
        row(None),
        row(""),
    ]
    data = build(use="conversations", path=str(write(folder, rows, name)))
    assert [sample.id for sample in data] == ["one", "two", "text", "empty", "12", "#6", "#7"]
    assert [len(sample.images) for sample in data] == [1, 2, 0, 0, 0, 0, 0]
    assert data[1].images == (folder / "b.png", folder / "a.png")
    stated = type(data).Options.model_validate({"path": folder / name})
    expected = type(data).expect(stated)
    assert expected is not None
    assert expected[0] == 7


def test_what_cannot_be_used_is_left_out_when_asked_and_said(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:200])
    bad = row("roles")
    bad["conversations"][0]["from"] = "tool"
    rows = [row("a", "a.png"), bad, row("gone", "none.png"), row("cut", ["b.png", "cut.png"])]
    rows += [row("again", "none.png"), row("b", "b.png")]
    path = str(write(folder, rows))
    with pytest.raises(DataError, match="sample `roles`"):
        build(use="conversations", path=path)
    data = build(use="conversations", path=path, unusable="skip")
    assert [sample.id for sample in data] == ["a", "b"]
    (note,) = data.notes()
    assert "4 of 6 samples are left out" in note
    assert "sample `roles`" in note
    assert "none.png" in note
    assert build(use="conversations", path=path, unusable="skip", limit=1).notes() == []


def test_a_missing_image_of_another_unicode_form_says_so(folder: Path) -> None:
    (folder / "a.png").rename(folder / normalize("NFD", "é.png"))
    path = str(
        write(folder, [row("a", normalize("NFC", "é.png")), row("b", "https://a.org/b.png")])
    )
    with pytest.raises(DataError, match="2 of 2 images are missing") as caught:
        build(use="conversations", path=path)
    assert "in the other Unicode form" in str(caught.value)
    assert "it is an address" in str(caught.value)


def test_rows_stay_in_the_file(tmp_path: Path) -> None:
    rows = [row(f"s{number}", question="what ? " * 60) for number in range(5000)]
    path = write(tmp_path, rows)
    size = path.stat().st_size
    del rows
    tracemalloc.start()
    data = build(use="conversations", path=str(path))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == 5000
    assert data[4999].id == "s4999"
    assert held < size / 10


def ids(folder: Path, **options: Any) -> list[str]:
    parts = [
        {"use": "conversations", "path": str(write(folder, [row(f"{name}{n}") for n in range(10)],
                                                   f"{name}.json"))}
        for name in "xy"
    ]  # fmt: skip
    return [sample.id for sample in build(use="mix", parts=parts, **options)]


def test_a_mix_uses_its_parts_as_often_as_their_weights_say(tmp_path: Path) -> None:
    both = [f"x{n}" for n in range(10)] + [f"y{n}" for n in range(10)]
    assert ids(tmp_path) == both
    assert ids(tmp_path, weights=[1, 2]) == [*both, *both[10:]]
    some = ids(tmp_path, weights=[0.3, 1.5])
    count = Counter(some)
    assert len(some) == 3 + 15
    assert all(1 <= count[f"y{n}"] <= 2 for n in range(10))
    assert max(count[f"x{n}"] for n in range(10)) == 1
    assert ids(tmp_path, weights=[0.3, 1.5]) == some
    assert ids(tmp_path, weights=[0.3, 1.5], seed=1) != some


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1]])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, weights: list[float]) -> None:
    with pytest.raises(ValidationError, match="weights"):
        ids(tmp_path, weights=weights)


def test_a_mix_expects_what_its_parts_expect() -> None:
    sizes = [{"samples": 100, "tokens": 30}, {"samples": 10, "tokens": 80}, None]
    parts = [
        {"use": "conversations", "path": f"{number}.json"} | ({"expect": size} if size else {})
        for number, size in enumerate(sizes)
    ]

    def expected(*chosen: dict[str, Any]) -> tuple[int, int] | None:
        table = {"use": "mix", "parts": chosen, "weights": [0.5, 2, 1][: len(chosen)]}
        use = Use[Dataset].model_validate(table)
        registry = Registry.installed()
        return registry.chosen(use).expect(registry.options(use))

    assert expected(*parts[:2]) == (70, 44)  # 50 of 30 tokens, and 20 of 80
    assert expected(*parts) is None


def test_reading_tells_how_far_it_is_alone_or_in_a_mix(data: Path) -> None:
    said: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, note: str = "") -> None:
        said.append((done, total, note))

    part = {"path": str(data / "train.json"), "images": str(data / "images")}
    use = Use[Dataset].model_validate({"use": "conversations", **part})
    Registry.installed().build(use, progress=progress)
    assert said == [(0, 1000, "0 rows read"), (0, 20, "images looked at")]
    mix = {"use": "mix", "parts": [{"use": "conversations", **part}] * 2}
    Registry.installed().build(Use[Dataset].model_validate(mix), progress=progress)
    assert len(said) == 6
