"""Images of every mode become RGB; what cannot be used is named with its sample."""

from __future__ import annotations

import struct
import timeit
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavakit import DataError
from llavakit.model.images import MissingImage, check_image, inside, open_image, whole_images

GREY = np.linspace(0, 255, 12 * 10).reshape(12, 10)


def grey16(folder: Path) -> Path:
    Image.fromarray((GREY * 257).round().astype(np.uint16)).save(folder / "a.png")
    return folder / "a.png"


def tiff(mode: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        kinds = {"I": np.int32, "F": np.float32}
        Image.fromarray(GREY.round().astype(kinds[mode])).save(folder / "a.tiff")
        return folder / "a.tiff"

    return write


def palette(folder: Path) -> Path:
    image = Image.fromarray(GREY.round().astype(np.uint8)).convert("P")
    image.save(folder / "a.png", transparency=bytes(range(256)))
    return folder / "a.png"


def converted(mode: str, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        Image.fromarray(GREY.round().astype(np.uint8)).convert("RGB").convert(mode).save(
            folder / name
        )
        return folder / name

    return write


def animated(folder: Path) -> Path:
    first = Image.fromarray(GREY.round().astype(np.uint8))
    first.save(folder / "a.gif", save_all=True, append_images=[Image.new("L", first.size, 255)])
    return folder / "a.gif"


def rotated(folder: Path) -> Path:
    image = Image.fromarray(GREY.round().astype(np.uint8)).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 6  # lies on its side
    image.save(folder / "a.png", exif=exif)
    return folder / "a.png"


@pytest.mark.parametrize(
    ("write", "tolerance"),
    [
        (grey16, 0.51),
        (tiff("I"), 0.51),
        (tiff("F"), 0.51),
        (palette, 0.51),
        (converted("L", "a.bmp"), 0.51),
        (converted("1", "a.png"), 255),
        (converted("LA", "a.png"), 0.51),
        (converted("RGBA", "a.png"), 0.51),
        (converted("RGBA", "a.webp"), 12),
        (converted("CMYK", "a.jpg"), 12),
        (converted("L", "a.jpg"), 12),
        (converted("YCbCr", "a.jpg"), 12),
        (animated, 0.51),
        (rotated, 0.51),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, write: Callable[[Path], Path], tolerance: float
) -> None:
    path = write(tmp_path)
    check_image(path, "sample `a`")
    image = open_image(path, "sample `a`")
    assert image.mode == "RGB"
    assert image.size == (10, 12)
    found = np.asarray(image, np.float64)
    assert np.abs(found - GREY[..., None]).max() <= tolerance


def test_an_image_in_memory_is_taken_as_it_is() -> None:
    assert open_image(Image.new("RGBA", (3, 2), (1, 2, 3, 4)), "x").getpixel((0, 0)) == (1, 2, 3)


def bomb(path: Path) -> None:
    """Write a small PNG that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    bomb(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png of sample `7` .*shrink it"):
        open_image(tmp_path / "a.png", "sample `7`")


def large_jpeg(path: Path, edge: int | None = None) -> None:
    """Write a JPEG of half a megabyte, claiming `edge` x `edge` pixels where that is given."""
    noise = np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95, exif=b"Exif\0\0" + bytes(3000))
    data = bytearray(path.read_bytes())
    frame = data.index(b"\xff\xc0")
    if edge is not None:
        data[frame + 5 : frame + 9] = struct.pack(">HH", edge, edge)
    path.write_bytes(data)


def test_a_decompression_bomb_is_found_before_training(tmp_path: Path) -> None:
    bomb(tmp_path / "a.png")
    large_jpeg(tmp_path / "a.jpg", 60_000)
    for name in ("a.png", "a.jpg"):
        assert list(whole_images([tmp_path / name])) == [False]
        with pytest.raises(DataError, match=rf"{name} of sample `7` .*shrink it"):
            check_image(tmp_path / name, "sample `7`")


def test_a_large_jpeg_is_looked_at_and_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_jpeg(tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").stat().st_size > 1 << 18
    monkeypatch.setattr("llavakit.model.images.open_image", None)  # cannot be called
    check_image(tmp_path / "a.jpg", "sample `7`")


@pytest.fixture(params=["png", "jpg", "gif", "webp", "bmp", "tiff"])
def photo(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    path = tmp_path / f"a.{request.param}"
    Image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_found_without_training(photo: Path, share: float) -> None:
    check_image(photo, "sample `7`")
    data = photo.read_bytes()
    photo.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="of sample `7`"):
        check_image(photo, "sample `7`")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("<html>404</html>")
    with pytest.raises(DataError, match="is not an image Pillow can read"):
        check_image(path, "sample `7`")
    with pytest.raises(DataError, match="cannot be read"):
        check_image(tmp_path, "sample `7`")
    with pytest.raises(DataError, match="cannot be read"):
        check_image(tmp_path / "none.jpg", "sample `7`")


def test_trailing_bytes_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (20, 20)).save(path)
    path.write_bytes(path.read_bytes() + b"\0\0made by a phone")
    check_image(path, "sample `7`")


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_is_a_traceback(photo: Path, seed: int) -> None:
    whole = photo.read_bytes()
    draw = np.random.default_rng(seed)
    for _ in range(60):
        data = bytearray(whole)
        for place in draw.integers(0, min(len(data), 400), 6):
            data[place] = draw.integers(256)
        photo.write_bytes(data)
        try:
            open_image(photo, "sample `7`")
        except DataError as error:
            assert "sample `7`" in str(error)  # noqa: PT017 - either outcome is right


def test_many_images_are_judged_in_order_as_one_by_one(photo: Path, tmp_path: Path) -> None:
    cut = tmp_path / f"cut{photo.suffix}"
    cut.write_bytes(photo.read_bytes()[:200])
    few: list[Path | str] = [
        photo,
        cut,
        tmp_path / "none.png",
        str(photo),
        "a\0b.png",
        "",
        tmp_path,
    ]
    paths = few * 900
    whole = list(whole_images(paths))
    quick = photo.suffix in (".png", ".jpg", ".webp")  # the others are left to be decoded
    assert whole == [quick, False, False, quick, False, False, False] * 900


@pytest.mark.parametrize("name", ["none.png", "a\0b.png", "", "x" * 5000, "file/a.png"])
def test_an_image_that_is_not_there_is_told_from_a_broken_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(MissingImage, match="of sample `7` cannot be read"):
        check_image(tmp_path / name, "sample `7`")
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError) as caught:
        check_image(tmp_path / "a.png", "sample `7`")
    assert not isinstance(caught.value, MissingImage)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_one_pixel(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "I", "F") else "a.png")
    Image.new(mode, (1, 1)).save(path)
    check_image(path, "x")
    assert (open_image(path, "x").mode, open_image(path, "x").size) == ("RGB", (1, 1))


def test_transparency_of_a_palette_shows_the_colour_below(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    found = open_image(tmp_path / "a.png", "x")
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]


def test_the_check_costs_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (640, 480)).save(path)
    seconds = min(timeit.repeat(lambda: check_image(path, "x"), number=200, repeat=5)) / 200
    assert seconds < 100e-6


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "b/../../a.png", ".."])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="lies outside"):
        inside(tmp_path, name, "sample `7`")


@pytest.mark.parametrize("name", ["a.png", "b/c/a.png", "b/../a.png", "..a.png", "./a.png"])
def test_a_path_within_the_folder_is_taken(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name, "sample `7`") == tmp_path / name


def test_a_link_within_the_folder_may_lead_out_of_it(tmp_path: Path) -> None:
    """Data sets are often laid out by links; whoever made them may read what they lead to."""
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(tmp_path / "elsewhere")
    path = inside(tmp_path / "images", "train/a.png", "x")
    check_image(path, "x")
    assert open_image(path, "x").size == (5, 4)
