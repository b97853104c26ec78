"""What is kept of a resized image has the bits of a whole resize; Pillow's memory is shared."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from llavakit_plugins.media import pixel_memory, resizing
from llavakit_plugins.media.pixel_memory import pixels_of
from llavakit_plugins.media.resizing import pad_and_resize, resize_middle
from llavakit_plugins.media.thin_images import pad_to_square

FILTERS = [Image.Resampling[name] for name in ("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX")]
SHAPES = [(640, 480), (480, 640), (500, 375), (640, 427), (300, 200), (90, 60), (61, 400), (33, 33)]


def noise(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    draw = np.random.default_rng(size)
    return draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def resized_size(shape: tuple[int, int], shorter: int) -> tuple[int, int]:
    longest = int(shorter * max(shape) / min(shape))
    return (longest, shorter) if shape[0] > shape[1] else (shorter, longest)


@pytest.mark.parametrize("how", FILTERS, ids=lambda how: how.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("edge", "more"), [(336, 0), (224, 0), (224, 32), (57, 1)])
def test_the_middle_has_the_bits_of_a_resize_and_a_crop(
    shape: tuple[int, int], edge: int, more: int, how: Image.Resampling
) -> None:
    image, size = Image.fromarray(noise(shape)), resized_size(shape, edge + more)
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    expected = image.resize(size, how).crop((left, top, left + edge, top + edge))
    assert resize_middle(image, size, edge, how).tobytes() == expected.tobytes()
    squashed = resize_middle(image, (edge, edge), edge, how)
    assert squashed.tobytes() == image.resize((edge, edge), how).tobytes()


@pytest.mark.parametrize("how", FILTERS, ids=lambda how: how.name)
@pytest.mark.parametrize("shape", [*SHAPES, (4200, 40)], ids=str)
def test_padding_rows_late_gives_the_bits_of_padding_first(
    shape: tuple[int, int], how: Image.Resampling
) -> None:
    image, colour = Image.fromarray(noise(shape)), (0.02, 0.5, 0.99)
    expected = pad_to_square(image, colour).resize((336, 336), how)
    assert pad_and_resize(image, colour, 336, how).tobytes() == expected.tobytes()


def test_no_more_is_computed_than_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def seen(self: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        made.append(size)
        return resize(self, size, *rest)

    resizing._splits()
    monkeypatch.setattr(Image.Image, "resize", seen)

    def sizes(shape: tuple[int, int], edge: int) -> list[tuple[int, int]]:
        made.clear()
        image = Image.new("RGB", shape)
        resize_middle(image, resized_size(shape, edge), edge, Image.Resampling.BICUBIC)
        return made

    # 10 pixels become 7, so that 80 become 56: the part from there is computed alone
    assert sizes((640, 480), 336) == [(336, 480), (336, 336)]
    # 320 pixels become 149: no part of that line, but the columns are done for what is kept
    assert sizes((640, 480), 224) == [(298, 480), (224, 224)]
    (width, rows), last = sizes((480, 640), 224)
    assert (width, last) == (224, (224, 298))
    assert rows < 510  # of 640


def test_a_pillow_that_resizes_otherwise_is_asked_for_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resizing, "_splits", lambda: False)
    image, size = Image.fromarray(noise((640, 480))), (448, 336)
    expected = image.resize(size, Image.Resampling.BICUBIC).crop((56, 0, 392, 336))
    found = resize_middle(image, size, 336, Image.Resampling.BICUBIC)
    assert found.tobytes() == expected.tobytes()


def test_a_part_is_computed_alone_only_where_no_weight_is_in_doubt() -> None:
    bicubic, nearest = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
    assert resizing._alone(640, 448, 56, 336, bicubic) == (80.0, 560.0, 56, 336)
    assert resizing._alone(500, 448, 56, 336, bicubic) == (62.5, 437.5, 56, 336)
    for line in ((640, 298, 37, 224, bicubic), (640, 448, 56, 336, nearest)):
        assert resizing._alone(*line) == (0, 640, 0, line[1])
    # Pillow rounds weights to multiples of 1/2^22
    doubtful = np.array([[0.5 / (1 << 22), 1 - 0.5 / (1 << 22)]])
    assert resizing._in_doubt(doubtful, 1000)
    assert not resizing._in_doubt(np.array([[0.5, 0.5]]), 1000)


def test_the_memory_of_an_image_outlives_it() -> None:
    pixels = noise((64, 48))
    image = Image.fromarray(pixels)
    found = pixels_of(image)
    del image
    gc.collect()
    others = [Image.fromarray(255 - pixels) for _ in range(8)]
    assert len(others) == 8
    assert (found[..., :3] == pixels).all()


def test_without_a_shared_memory_it_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise((64, 48))
    large = Image.new("RGB", (2500, 2000), (1, 2, 3))  # in two blocks of Pillow's
    assert pixels_of(large).shape == (2000, 2500, 3)
    monkeypatch.setattr(pixel_memory, "_SHARES", False)
    image = Image.fromarray(pixels)
    found = pixels_of(image)
    assert found.shape == (48, 64, 3)
    assert (found == pixels).all()
    found[:] = 0
    assert (np.asarray(image) == pixels).all()
