"""`llava-run check-data --tiling`: rows of images as transformers counts them, from headers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tests.conftest import Command
from tests.plugins.datasets.shards import talk, write_rows

SIZES = [(640, 480), (480, 640), (336, 336), (300, 2000), (2000, 300), (1, 1), (1200, 1100)]
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA-NeXT's


def rows_of_transformers(width: int, height: int) -> int:
    """The rows of an image in LlavaNextProcessor's prompt, by its own method."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    processor: Any = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=PINPOINTS)
    return int(processor._get_number_of_features(height, width, 336, 336))


def write(folder: Path, samples: Sequence[Sequence[tuple[int, int]]]) -> Path:
    """Write rows with images of these sizes."""
    (folder / "images").mkdir()
    rows = []
    for number, sizes in enumerate(samples):
        names = [f"{number}-{at}.png" for at in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            Image.new("RGB", size, (9, 99, 199)).save(folder / "images" / name)
        row = {
            "id": f"s{number}",
            "conversations": talk("<image> " * len(sizes) + "what ?", "so ."),
        }
        rows.append(row | {"image": names[0] if len(names) == 1 else names})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.fixture
def check(llava_run: Command) -> Callable[..., Any]:
    """A function that checks data and returns the report."""

    def checked(*arguments: object, code: int = 0) -> Any:
        given = ("--json", "--visual-tokens", 576, "--max-length", 8192)
        found = llava_run("check-data", *arguments, *given)
        assert found.code == code, found.err
        return json.loads(found.out)

    return checked


@pytest.mark.parametrize("stored", ["files", "shards"])
def test_rows_are_those_of_transformers(
    tmp_path: Path, check: Callable[..., Any], stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: object = write(tmp_path, [[size] for size in SIZES])
    given: tuple[object, ...] = (path, "--images", tmp_path / "images")
    if stored == "shards":
        rows = json.loads((tmp_path / "rows.json").read_text())
        given = (write_rows(tmp_path, rows, tmp_path / "images", 2),)
    plain = check(*given)
    assert plain["tiling"] is None
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("an image is decoded"))
    report = check(*given, "--tiling", "anyres")
    assert (report["tiling"], report["samples"]) == ("anyres", len(SIZES))
    rows_of_images = report["tokens"]["total"] - plain["tokens"]["total"] + 576 * len(SIZES)
    assert rows_of_images == sum(rows_of_transformers(*size) for size in SIZES)
    text = plain["tokens"]["longest"] - 576
    longest = max(rows_of_transformers(*size) for size in SIZES)
    assert report["tokens"]["longest"] == longest + text
    assert report["learned_tokens"] == plain["learned_tokens"]


def test_its_options_count(tmp_path: Path, check: Callable[..., Any]) -> None:
    """One image of two is one view in OneVision; without separators and unpadding, whole views."""
    path = write(tmp_path, [[(640, 480)], [(640, 480), (336, 300)]])
    given = (path, "--images", tmp_path / "images")
    plain = check(*given)["tokens"]["total"]
    alone = check(*given, "--tiling", "anyres", "only_alone=true")["tokens"]["total"]
    separators = 2  # one behind each image that is one view, as in transformers' OneVision
    assert alone - plain == rows_of_transformers(640, 480) - 576 + separators
    bare = ("anyres", "newline=false", "unpad=false", "grids=[[2, 2]]")
    whole = check(*given, "--tiling", *bare)["tokens"]["total"]
    assert whole - plain == 3 * 4 * 576
    single = check(*given, "--tiling", "single")
    assert (single["tokens"]["total"], single["tiling"]) == (plain, None)


def test_samples_that_only_a_tiling_makes_too_long(tmp_path: Path, llava_run: Command) -> None:
    path = write(tmp_path, [[(1200, 1100)], [(100, 90)]])
    given: tuple[object, ...] = ("check-data", path, "--images", tmp_path / "images", "--json")
    given += ("--visual-tokens", 576, "--max-length", 2048)
    assert json.loads(llava_run(*given).out)["cut"] == 0
    code, out, _ = llava_run(*given, "--tiling", "anyres")
    report = json.loads(out)
    long = [rows_of_transformers(*size) > 2040 for size in ((1200, 1100), (100, 90))]
    assert (report["cut"], report["nothing_learned"]) == (sum(long), sum(long))
    assert (code, sum(long)) == (2, 1)
    sorts = {sort["sort"]: sort["messages"] for sort in report["findings"]}
    assert "teaches nothing: its answers lie behind the cut" in sorts["nothing learned"][0]


def test_a_broken_image_is_found_once_and_counted_as_a_usual_one(
    tmp_path: Path, check: Callable[..., Any]
) -> None:
    path = write(tmp_path, [[(640, 480)], [(640, 480)], [(640, 480)]])
    (tmp_path / "images" / "1-0.png").write_bytes(b"no image")
    (tmp_path / "images" / "2-0.png").unlink()
    report = check(path, "--images", tmp_path / "images", "--tiling", "anyres", code=2)
    assert (report["broken_images"], report["missing_images"]) == (1, 1)
    tokens = report["tokens"]
    assert tokens["total"] == 3 * tokens["longest"]


@pytest.mark.parametrize(
    ("tiling", "said"),
    [
        (("anyress",), "did you mean `anyres`?"),
        (("anyres", "gird=2"), "gird"),
        (("anyres", "max_tiles=0"), "max_tiles"),
        (("anyres", "grids=7"), "grids"),
    ],
)
def test_what_is_no_tiling_is_a_sentence(
    tmp_path: Path, refused: Callable[..., str], tiling: tuple[str, ...], said: str
) -> None:
    path = write(tmp_path, [[(64, 48)]])
    assert said in refused("check-data", path, "--images", tmp_path / "images", "--tiling", *tiling)
    size = ("--images", tmp_path / "images", "--tiling", "anyres", "--view-size", 0)
    assert "--view-size" in refused("check-data", path, *size)
