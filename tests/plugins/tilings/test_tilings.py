"""The built-in tilings: their contracts, transformers' own arrangement and pixels, sums by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from tests.conftest import LANGUAGE, VISION

from llavakit import Arrangement, ModelError, Shown, Tiling, View
from llavakit.contracts.component import Options
from llavakit.testing import TilingContract
from llavakit_plugins.tilings.anyres import Anyres, AnyresOptions
from llavakit_plugins.tilings.grid import Grid, GridOptions
from llavakit_plugins.tilings.single import Single
from llavakit_plugins.vision.preprocessing import MEAN, STD, Square, to_square

SIZE, EDGE = VISION["image_size"], VISION["image_size"] // VISION["patch_size"]
VIEW = View(SIZE, EDGE**2)


class TestSingle(TilingContract):
    def build(self) -> Tiling:
        return Single(Options())


class TestAnyres(TilingContract):
    def build(self) -> Tiling:
        return Anyres(AnyresOptions())


class TestAnyresOfOneVision(TilingContract):
    def build(self) -> Tiling:
        self.options = {"grids": "6x6", "cap": 9, "only_alone": True}
        return Anyres(AnyresOptions.model_validate(self.options))


class TestAnyresWithoutSeparators(TilingContract):
    def build(self) -> Tiling:
        self.options = {"newline": False, "unpad": False, "max_tiles": 2}
        return Anyres(AnyresOptions.model_validate(self.options))


class TestGrid(TilingContract):
    def build(self) -> Tiling:
        self.options = {"rows": 2, "columns": 3}
        return Grid(GridOptions(rows=2, columns=3))


# -- transformers' own functions -------------------------------------------------------------------


def sizes() -> list[tuple[int, int]]:
    """Return widths and heights: corners, usual ones, and 40 that were drawn."""
    drawn = np.random.default_rng(0).integers(1, 1200, (40, 2)).tolist()
    fixed = [(1, 1), (4000, 300), (300, 4000), (SIZE, SIZE), (SIZE + 1, SIZE), (640, 480), (1, 199)]
    return fixed + [(width, height) for width, height in drawn]


def laid_out(found: Arrangement, embeddings_NE: torch.Tensor, newline_E: torch.Tensor) -> Any:
    """Return the rows of an image, row by row."""
    rows = []
    for number, index_K in enumerate(found.index_RK.tolist()):
        if index_K[0] < 0:
            rows.append(newline_E)
            continue
        weights = [1.0] if found.weights_RK is None else found.weights_RK[number].tolist()
        rows.append(
            sum(embeddings_NE[i].double() * w for i, w in zip(index_K, weights, strict=True))
        )
    return torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in rows])


def pinpoints(grids: list[tuple[int, int]]) -> list[list[int]]:
    return [[rows * SIZE, columns * SIZE] for rows, columns in grids]


NEXT = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
ALL = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """`pack_image_features` of LLaVA-NeXT and of LLaVA-OneVision."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextModel,
        LlavaOnevisionConfig,
        LlavaOnevisionModel,
        Qwen2Config,
        SiglipVisionConfig,
    )

    shape = {**VISION, "num_hidden_layers": 1}
    following = LlavaNextModel(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**shape),
            text_config=LlamaConfig(**LANGUAGE),
            image_grid_pinpoints=pinpoints(NEXT),
        )
    )
    shape.pop("projection_dim")
    onevision = LlavaOnevisionModel(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**shape),
            text_config=Qwen2Config(**LANGUAGE),
            image_grid_pinpoints=pinpoints(ALL),
        )
    )
    return {
        "next": lambda features, sizes, newline: following.pack_image_features(
            features, sizes, "default", newline
        )[0],
        "onevision": lambda features, sizes, newline: onevision.pack_image_features(
            features, sizes, newline, "anyres_max_9"
        )[0],
    }


@pytest.mark.parametrize("family", ["next", "onevision"])
def test_rows_are_those_of_transformers(family: str, theirs: dict[str, Any]) -> None:
    options = AnyresOptions.model_validate({} if family == "next" else {"grids": "6x6", "cap": 9})
    tiling = Anyres(options)
    draw = torch.Generator().manual_seed(0)
    capped = 0
    for width, height in sizes():
        found = tiling.arrange(Shown(width, height), VIEW)
        embeddings = torch.randn(found.views, VIEW.tokens, 3, generator=draw)
        newline = torch.randn(3, generator=draw)
        expected = theirs[family]([embeddings], torch.tensor([[height, width]]), newline)[0]
        rows = laid_out(found, embeddings.flatten(0, 1), newline)
        assert rows.shape == expected.shape, (width, height)
        torch.testing.assert_close(rows.float(), expected, atol=2e-5, rtol=0)
        capped += found.weights_RK is not None
    assert bool(capped) == (family == "onevision")


def test_pixels_are_those_of_transformers() -> None:
    from transformers import LlavaNextImageProcessorPil

    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=pinpoints(NEXT),
    )
    tiling = Anyres(AnyresOptions())
    draw = np.random.default_rng(0)
    for width, height in sizes():
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        views = tiling.cut(image, Shown(width, height), VIEW)
        pixels = [to_square(view, Square(SIZE, "crop", MEAN, STD)) for view in views]
        assert torch.equal(torch.stack(pixels), expected), (width, height)


# -- by hand ---------------------------------------------------------------------------------------


def test_an_image_twice_as_wide_takes_two_tiles() -> None:
    found = Anyres(AnyresOptions()).arrange(Shown(2 * SIZE, SIZE), View(SIZE, 4))
    base, first, second = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]
    lines = [first[0], first[1], second[0], second[1], -1, first[2], first[3], second[2], second[3]]
    assert found.views == 3
    assert found.index_RK[:, 0].tolist() == [*base, *lines, -1]


def test_padding_is_left_out() -> None:
    # 8 x 8 embeddings, of which an image four times as wide as high covers 2 of 8 lines
    thin = Anyres(AnyresOptions(grids=((2, 2),))).arrange(Shown(4 * SIZE, SIZE), View(SIZE, 16))
    assert thin.index_RK.shape == (16 + 2 * 9, 1)
    whole = Anyres(AnyresOptions(grids=((2, 2),), unpad=False))
    assert len(whole.arrange(Shown(4 * SIZE, SIZE), View(SIZE, 16)).index_RK) == 16 + 8 * 9


def test_a_cap_interpolates_between_neighbours() -> None:
    tiling = Anyres(AnyresOptions(grids=((1, 2),), cap=1, newline=False))
    found = tiling.arrange(Shown(2 * SIZE, SIZE), View(SIZE, 4))
    # 2 x 4 embeddings are more than a cap of 4 by sqrt(2), above 1.1: 1 x 2 are left, each amid 4
    base, blended = found.index_RK[:4], found.index_RK[4:]
    assert base[:, 0].tolist() == [0, 1, 2, 3]
    assert [sorted(row) for row in blended.tolist()] == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert found.weights_RK is not None
    assert found.weights_RK[4:].tolist() == [[0.25] * 4] * 2


def test_an_image_among_others_stays_one_view() -> None:
    tiling = Anyres(AnyresOptions(only_alone=True))
    found = tiling.arrange(Shown(2 * SIZE, SIZE, images=2), VIEW)
    assert found.views == 1
    assert found.index_RK[:, 0].tolist() == [*range(VIEW.tokens), -1]


def test_grids_are_listed_row_by_row_and_limited() -> None:
    assert AnyresOptions.model_validate({"grids": "2x3"}).grids == (
        (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3),
    )  # fmt: skip
    tiling = Anyres(AnyresOptions.model_validate({"grids": "6x6", "max_tiles": 4}))
    most = max(tiling.arrange(Shown(w, h), VIEW).views for w, h in sizes())
    assert most == 5
    for wrong in ("6", "0x2", "axb"):
        with pytest.raises(ValidationError, match='"6x6"'):
            AnyresOptions.model_validate({"grids": wrong})


def test_views_without_a_square_are_refused() -> None:
    with pytest.raises(ModelError, match=r"17 visual tokens, which form no square.*`select"):
        Anyres(AnyresOptions()).arrange(Shown(9, 9), View(SIZE, 17))


def test_a_grid_shows_the_whole_image_and_then_its_tiles() -> None:
    pixels = np.arange(4, dtype=np.uint8).repeat(3).reshape(2, 2, 3) * 80
    image = Image.fromarray(pixels).resize((4 * SIZE, 2 * SIZE), Image.Resampling.NEAREST)
    views = Grid(GridOptions()).cut(image, Shown(*image.size), VIEW)
    assert [view.size for view in views] == [(SIZE, SIZE)] * 5
    middles = [view.getpixel((SIZE // 2, SIZE // 2)) for view in views[1:]]
    assert middles == [(0, 0, 0), (80, 80, 80), (160, 160, 160), (240, 240, 240)]
    alone = Grid(GridOptions(base=False)).arrange(Shown(9, 9), VIEW)
    assert alone.index_RK[:, 0].tolist() == list(range(4 * VIEW.tokens))
