"""Images that numba's loops resize have the bits of Pillow's; they are loaded where they pay."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from tests.plugins.media.test_resizing import FILTERS, SHAPES, noise, resized_size
from torch.nn.functional import interpolate
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llavakit_plugins.media import resizing
from llavakit_plugins.media.pixel_memory import pixels_of
from llavakit_plugins.media.resizing import (
    middle_pixels,
    pad_and_resize,
    padded_pixels,
    part_by,
    resize,
    resize_middle,
)
from llavakit_plugins.onnx.runtime.pictures import Preparation
from llavakit_plugins.vision import preprocessing
from llavakit_plugins.vision.preprocessing import MEAN, STD, Square, to_square

needs_numba = pytest.mark.skipif(
    find_spec("numba") is None, reason="numba is not installed (pip install 'llavakit[images]')"
)
Filter = Image.Resampling


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes to which the loops resize, from the first image on."""
    monkeypatch.setattr(resizing._Resized, "pixels", resizing._MANY + 1)
    made: list[tuple[int, int]] = []

    def seen(loops: Any, pixels: Any, size: tuple[int, int], *rest: Any) -> Any:
        made.append(size)
        return part_by(loops, pixels, size, *rest)

    resizing._load()
    monkeypatch.setattr(resizing, "part_by", seen)
    return made


@needs_numba
@pytest.mark.parametrize("how", FILTERS, ids=lambda how: how.name)
@pytest.mark.parametrize("shape", [*SHAPES, (4200, 40), (2500, 2000)], ids=str)
def test_they_give_the_bits_of_pillow(
    shape: tuple[int, int], how: Filter, many: list[tuple[int, int]]
) -> None:
    image, size, colour = Image.fromarray(noise(shape)), resized_size(shape, 224), (0.02, 0.5, 0.99)
    found = middle_pixels(image, size, 224, how)[..., :3]
    assert found.tobytes() == resize_middle(image, size, 224, how).tobytes()
    found = padded_pixels(image, colour, 224, how)[..., :3]
    assert found.tobytes() == pad_and_resize(image, colour, 224, how).tobytes()
    assert resize(image, (90, 70), how).tobytes() == image.resize((90, 70), how).tobytes()
    curved = how in (Filter.BILINEAR, Filter.BICUBIC)
    assert ((224, 224) in many) == curved
    # tall images are Pillow's where it does their columns first
    assert len(many) >= 2 * curved


Sized = tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]
edges = st.integers(1, 150)
curved_filters = st.sampled_from([Filter.BILINEAR, Filter.BICUBIC])


@st.composite
def any_part(draw: st.DrawFn) -> Sized:
    """An image's width and height, those that it is resized to, and a part of that."""
    width, height, wide, high = (draw(edges) for _ in range(4))
    left, top = draw(st.integers(0, wide - 1)), draw(st.integers(0, high - 1))
    right, bottom = draw(st.integers(left + 1, wide)), draw(st.integers(top + 1, high))
    return (width, height), (wide, high), (left, top, right, bottom)


@needs_numba
@settings(max_examples=150, deadline=None)
@given(any_part(), curved_filters)
def test_any_part_of_any_size_has_them(sized: Sized, how: Filter) -> None:
    (width, height), size, box = sized
    draw = np.random.default_rng(width * height)
    # black and white alone: sums beyond a byte are cut
    pixels = draw.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    rows_first = Image.fromarray(pixels).resize((size[0], height), how).resize(size, how)
    found = part_by(resizing._load(), pixels, size, box, how).transpose(1, 2, 0)
    assert found.tobytes() == rows_first.crop(box).tobytes()


@needs_numba
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_encoders_read_what_those_of_transformers_read(
    aspect: Any, many: list[tuple[int, int]]
) -> None:
    square = Square(64, aspect, MEAN, STD)
    shape: Any = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    theirs = LlavaImageProcessorPil(do_pad=aspect == "pad", **shape)
    exported = Preparation(
        size=64, aspect=aspect, resample="bicubic", resized=64, mean=MEAN, std=STD
    )
    for size in ((640, 480), (333, 500), (80, 70)):
        image = Image.fromarray(noise(size))
        expected = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(to_square(image, square), expected)
        assert (exported.prepare(image) == expected.numpy()).all()
    assert len(many) >= 4


@needs_numba
@settings(max_examples=150, deadline=None)
@given(any_part(), curved_filters)
def test_any_part_of_any_size_has_the_bits_of_pytorch(sized: Sized, how: Filter) -> None:
    (width, height), size, box = sized
    draw = np.random.default_rng(width * height)
    pixels = draw.integers(0, 2, (height, width + 3, 4), dtype=np.uint8)[:, 1:-2] * 255
    whole = torch.from_numpy(pixels[..., :3]).permute(2, 0, 1)[None]
    if (width, height) != size:
        whole = interpolate(whole, size[::-1], mode=how.name.lower(), antialias=True)
    left, top, right, bottom = box
    found = part_by(resizing._load(), pixels, size, box, how, short=True)
    assert (found == whole[0, :, top:bottom, left:right].numpy()).all()


@needs_numba
@pytest.mark.parametrize("aspect", ["crop", "pad", "squash"])
@pytest.mark.parametrize("fast", [False, True])
def test_encoders_with_pixels_of_pytorch_read_the_same(
    aspect: Any, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    square = Square(64, aspect, MEAN, STD, fast=fast, backend="torchvision")
    images = [Image.fromarray(noise(size)) for size in ((200, 150), (80, 70), (41, 63), (900, 333))]
    expected = [to_square(image, square) for image in images]
    monkeypatch.setattr(resizing._Resized, "pixels", resizing._MANY + 1)
    made: list[tuple[int, ...]] = []

    def seen(loops: Any, pixels: Any, *rest: Any, **more: Any) -> Any:
        made.append(pixels.shape)
        return part_by(loops, pixels, *rest, **more)

    monkeypatch.setattr(preprocessing, "part_by", seen)
    found = [to_square(image, square) for image in images]
    assert all(map(torch.equal, found, expected))
    # of the last one so much is left out, unless it is shrunk before, that PyTorch is as fast
    assert len(made) == (4 if fast and aspect != "pad" else 3)


@needs_numba
def test_a_pytorch_with_other_bits_resizes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = resizing._load()
    assert preprocessing._agree.__wrapped__(loops)
    right = preprocessing._resize
    monkeypatch.setattr(preprocessing, "_resize", lambda *given: right(*given) ^ 1)
    assert not preprocessing._agree.__wrapped__(loops)


def test_they_are_loaded_only_behind_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[None] = []
    monkeypatch.setattr(resizing, "_load", lambda: loaded.append(None))
    monkeypatch.setattr(resizing._Resized, "pixels", resizing._MANY - 64 * 48)
    image = Image.fromarray(noise((64, 48)))
    expected = image.resize((32, 24), Filter.BICUBIC).tobytes()
    assert resize(image, (32, 24), Filter.BICUBIC).tobytes() == expected
    assert not loaded
    assert resize(image, (32, 24), Filter.BICUBIC).tobytes() == expected
    assert loaded


@needs_numba
def test_a_pillow_with_other_bits_resizes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from llavakit_plugins.media import compiled_resizing

    assert resizing._load.__wrapped__() is compiled_resizing
    right = compiled_resizing.resize_part
    monkeypatch.setattr(compiled_resizing, "resize_part", lambda *given: right(*given) ^ 1)
    assert resizing._load.__wrapped__() is None


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (ModuleNotFoundError("No module named 'numba'"), []),
        (ImportError("Numba needs NumPy 2.5 or less"), ["Numba needs NumPy 2.5 or less"]),
        (RuntimeError("cannot cache function"), ["cannot cache function"]),
        (TypeError("No conversion from int8"), ["No conversion from int8"]),  # as numba's are
    ],
)
def test_without_numba_pillow_resizes(
    problem: Exception,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refusing:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "llavakit_plugins.media.compiled_resizing":
                raise problem

    monkeypatch.delitem(sys.modules, "llavakit_plugins.media.compiled_resizing", raising=False)
    monkeypatch.delattr("llavakit_plugins.media.compiled_resizing", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    assert resizing._load.__wrapped__() is None
    assert [text.partition("be used: ")[2] for text in caplog.messages] == said
    monkeypatch.setattr(resizing, "_load", resizing._load.__wrapped__)
    monkeypatch.setattr(resizing._Resized, "pixels", resizing._MANY)
    image = Image.fromarray(noise((64, 48)))
    found = middle_pixels(image, (42, 32), 32, Filter.BICUBIC)
    assert (found == pixels_of(resize_middle(image, (42, 32), 32, Filter.BICUBIC))).all()
