"""Pixels equal those of transformers' processors to the last bit; the fast path is near them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from tests import published
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llavakit.stream.images import open_image
from llavakit_plugins.onnx.runtime.pictures import Preparation
from llavakit_plugins.vision.pixels import make_processor
from llavakit_plugins.vision.preprocessing import MEAN, RGB, STD, Square, pad_to_square, to_square

PHOTOS = sorted((published.folder() / "images").glob("*.jpg"))
SIZES = [(1, 1), (7, 5), (224, 224), (33, 31), (500, 31), (31, 500), (223, 225), (640, 480)]
HALF: RGB = (0.5, 0.5, 0.5)


def noise(size: tuple[int, int]) -> Image.Image:
    draw = np.random.default_rng(size)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def pictures() -> list[Any]:
    made = [pytest.param(noise(size), id=f"{size[0]}x{size[1]}") for size in SIZES]
    return made + [pytest.param(open_image(path, "x"), id=path.stem) for path in PHOTOS]


def theirs(processor: Any, image: Image.Image) -> torch.Tensor:
    pixels: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return pixels


@pytest.mark.parametrize("size", [224, 31])
@pytest.mark.parametrize("image", pictures())
def test_crop_equals_transformers_clip_processor(image: Image.Image, size: int) -> None:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    found = to_square(image, Square(size, "crop", MEAN, STD))
    assert found.dtype == torch.float32
    assert torch.equal(found, theirs(processor, image))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("image", pictures())
def test_squash_equals_transformers_siglip_processor(image: Image.Image, resample: Any) -> None:
    processor = SiglipImageProcessorPil(
        size={"height": 384, "width": 384},
        resample=Image.Resampling[resample.upper()],  # SigLIP is bicubic, SigLIP 2 bilinear
    )
    found = to_square(image, Square(384, "squash", HALF, HALF, resample))
    assert torch.equal(found, theirs(processor, image))


def expand(image: Image.Image, mean: RGB) -> Image.Image:
    """The original's way of padding, in numpy: the image in the middle of the mean colour."""
    pixels = np.asarray(image)
    edge = max(image.size)
    canvas = np.empty((edge, edge, 3), np.uint8)
    canvas[:] = [int(255 * value) for value in mean]
    top, left = (edge - image.height) // 2, (edge - image.width) // 2
    canvas[top : top + image.height, left : left + image.width] = pixels
    return Image.fromarray(canvas)


@pytest.mark.parametrize("image", pictures())
def test_pad_equals_padding_before_transformers_processor(image: Image.Image) -> None:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    found = to_square(image, Square(336, "pad", MEAN, STD))
    assert torch.equal(found, theirs(processor, expand(image, MEAN)))
    assert pad_to_square(image, MEAN).tobytes() == expand(image, MEAN).tobytes()


@pytest.mark.parametrize("image", pictures())
@pytest.mark.parametrize(
    ("aspect", "interpolation"),
    [("crop", "bicubic"), ("pad", "bicubic"), ("squash", "bicubic"), ("squash", "bilinear")],
)
def test_the_other_backend_equals_transformers_default(
    image: Image.Image, aspect: Any, interpolation: Any
) -> None:
    square = Square(112, aspect, MEAN, STD, interpolation, backend="torchvision")
    processor = make_processor(square)
    assert type(processor).__mro__[1].__name__ == "TorchvisionBackend"
    assert torch.equal(to_square(image, square), theirs(processor, image))


@pytest.mark.parametrize("size", [(64, 1), (1, 64), (3200, 50), (50, 3200), (7, 440)])
def test_a_thin_image_is_exact_up_to_64_times_as_long_as_wide(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    found = to_square(noise(size), Square(56, "crop", MEAN, STD))
    assert torch.equal(found, theirs(processor, noise(size)))
    padded = to_square(noise(size), Square(56, "pad", MEAN, STD))
    assert torch.equal(padded, theirs(processor, expand(noise(size), MEAN)))


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (40, 4000), (4000, 40), (5, 999), (999, 5)])
def test_a_thinner_image_is_cut_first_and_looks_the_same(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
    )
    found = to_square(noise(size), Square(112, "crop", MEAN, STD))
    apart = np.abs(levels(found) - levels(theirs(processor, noise(size))))
    assert apart.max() < 12  # of noise: less than half a pixel of the result to the side
    assert apart.mean() < 3


@pytest.mark.parametrize("aspect", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(20_000, 100), (100, 20_000), (60_000, 300)])
def test_a_thin_image_is_never_made_a_huge_one(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], aspect: Any
) -> None:
    made: list[int] = []
    resize, new = Image.Image.resize, Image.new

    def seen_resize(self: Image.Image, size: Any, *rest: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *rest)

    def seen_new(mode: str, size: Any, *rest: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return new(mode, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", seen_resize)
    monkeypatch.setattr(Image, "new", seen_new)
    image = new("RGB", size, (200, 10, 30))
    pixels = to_square(image, Square(336, aspect, MEAN, STD))
    assert max(made) < 18_000_000
    if aspect != "pad":  # of which a line of a pixel or two is left
        assert np.abs(levels(pixels)[:, 168, 168] - [200, 10, 30]).max() < 1


def levels(pixels: torch.Tensor) -> npt.NDArray[np.float64]:
    std, mean = np.array(STD)[:, None, None], np.array(MEAN)[:, None, None]
    found: npt.NDArray[np.float64] = (pixels.double().numpy() * std + mean) * 255
    return found


def photograph(size: tuple[int, int], folder: Path, kind: str) -> Path:
    """A picture as smooth and as sharp as a photograph: blobs, edges and a little noise."""
    if PHOTOS:
        image = Image.open(PHOTOS[-1]).convert("RGB")
    else:
        image = noise((24, 16)).resize((1000, 667), Image.Resampling.BICUBIC)
    path = folder / f"a.{kind}"
    image.resize(size, Image.Resampling.LANCZOS).save(path, quality=92, compress_level=1)
    return path


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("size", [(640, 480), (1500, 1000), (230, 300), (90, 60)])
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_the_fast_path_is_near_the_exact_one(
    tmp_path: Path, kind: str, size: tuple[int, int], aspect: Any
) -> None:
    path = photograph(size, tmp_path, kind)
    exact = to_square(open_image(path, "x"), Square(224, aspect, MEAN, STD))
    fast = to_square(open_image(path, "x", 224), Square(224, aspect, MEAN, STD, fast=True))
    apart = np.abs(levels(fast) - levels(exact))
    assert apart.mean() <= 4  # of 255 levels, as docs/recipes.md says


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (640, 427), (500, 333)])
def test_the_fast_path_moves_a_part_by_a_fraction_of_a_pixel(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    image = open_image(photograph(size, tmp_path, "png"), "x")
    square = Square(336, "crop", MEAN, STD, backend="torchvision")  # no smaller than half the image
    fast = levels(to_square(image, square._replace(fast=True)))
    apart = np.abs(fast - levels(to_square(image, square)))
    assert apart.mean() <= 0.25  # of 255 levels, as docs/benchmarks.md says


def test_a_jpeg_is_decoded_no_smaller_than_asked(tmp_path: Path) -> None:
    for size in ((447, 600), (448, 600), (449, 700), (223, 500), (1793, 1793), (2000, 896)):
        path = tmp_path / "a.jpg"
        noise(size).save(path)
        image = open_image(path, "x", 224)
        factor = max(f for f in (1, 2, 4, 8) if f == 1 or min(size) // 224 >= f)
        assert image.size == tuple(-(-edge // factor) for edge in size)
        assert min(image.size) >= min(224, *size)
        assert open_image(path, "x").size == size


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_small_decoding_keeps_to_rgb(tmp_path: Path, mode: str) -> None:
    noise((900, 900)).convert(mode).save(tmp_path / "a.jpg")
    image = open_image(tmp_path / "a.jpg", "x", 224)
    assert (image.mode, image.size) == ("RGB", (225, 225))


@pytest.mark.parametrize("size", [(6500, 100), (100, 20_000), (4097, 40), (17, 3000), (300, 200)])
@pytest.mark.parametrize("aspect", ["crop", "pad", "squash"])
def test_the_onnx_runtime_bounds_thin_images_as_training_does(
    size: tuple[int, int], aspect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    new = Image.new

    def watched(mode: str, edges: tuple[int, int], *more: Any) -> Image.Image:
        made.append(edges)
        return new(mode, edges, *more)

    monkeypatch.setattr(Image, "new", watched)
    image = noise(size)
    ours = Preparation(
        size=32, aspect=aspect, resample="bicubic", resized=32, mean=MEAN, std=STD
    ).prepare(image)
    assert all(width * height <= 4096**2 for width, height in made)
    expected = to_square(image, Square(32, aspect, MEAN, STD))
    np.testing.assert_array_equal(ours, expected.numpy())


@pytest.mark.parametrize("image", pictures())
def test_the_onnx_runtime_looks_up_what_transformers_computes(image: Image.Image) -> None:
    shape: dict[str, Any] = {"size": {"shortest_edge": 224}, "do_normalize": True}
    processor = CLIPImageProcessorPil(crop_size={"height": 224, "width": 224}, **shape)
    ours = Preparation(
        size=224, aspect="crop", resample="bicubic", resized=224, mean=MEAN, std=STD
    ).prepare(image)
    np.testing.assert_array_equal(ours, theirs(processor, image).numpy())
