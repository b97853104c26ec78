"""Videos are read as transformers reads them, and what is broken is a sentence."""

from __future__ import annotations

import struct
from base64 import b64encode, encodebytes
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from tests.made_videos import greys, write_frames, write_video

from llavakit import Clip, DataError, Registry, Tiling, Use, Video, View, Views
from llavakit_plugins.media import check_video, clip, frames, video_files

CODECS = {
    "a.mp4": "libx264", "b.mp4": "mpeg4", "c.webm": "libvpx-vp9", "d.mkv": "mpeg4",
    "e.avi": "mpeg4", "f.ts": "libx264", "g.mov": "libx264",
}  # fmt: skip


def moving(count: int) -> list[Any]:
    """Return frames that differ in more than their level, so that codecs have work to do."""
    draw = np.random.default_rng(0)
    base = draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return [np.roll(base, 3 * number, axis=1) for number in range(count)]


@pytest.mark.parametrize("name", CODECS)
def test_files_are_read_as_transformers_reads_them(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, moving(30), codec=CODECS[name])
    assert clip(Video(path), "s") == Clip(64, 48, 30, 10.0)
    kept = [0, 1, 7, 19, 29]
    found = frames(Video(path), kept, "s")
    from transformers import video_utils

    read: Any = video_utils.read_video_pyav
    known, _ = read(str(path), lambda metadata, **_: kept)
    assert np.array_equal(np.stack([np.asarray(image) for image in found]), known)


def test_a_video_is_a_file_its_bytes_an_address_or_frames(tmp_path: Path) -> None:
    shades = greys(12)
    folder = write_frames(tmp_path / "clip", shades)
    (folder / "notes.txt").write_text("none of the frames")
    (folder / ".hidden.png").write_bytes(b"")
    array = np.stack(shades)
    given = [folder, str(folder), tuple(map(Image.fromarray, shades)), array,
             torch.from_numpy(array).permute(0, 3, 1, 2), Video(folder)]  # fmt: skip
    for source in given:
        video = Video(source)  # type: ignore[arg-type]
        assert clip(video, "s") == Clip(64, 48, 12, 0.0)
        found = frames(video, [0, 9, 10, 11], "s")  # 9.png comes in front of 10.png
        assert [np.asarray(image)[0, 0, 0] for image in found] == [
            shades[i][0, 0, 0] for i in (0, 9, 10, 11)
        ]
    path = write_video(tmp_path / "a.mp4", shades)
    data = path.read_bytes()
    address = f"data:video/mp4;base64,{b64encode(data).decode()}"
    for source in (path, str(path), data, path.as_uri(), address):
        assert clip(Video(source), "s") == Clip(64, 48, 12, 10.0)
        level = np.asarray(frames(Video(source), [11], "s")[0])[0, 0, 0]
        assert level == pytest.approx(255, abs=3)


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", greys(5))
    assert clip(Video(path), "s").frames == 5
    write_video(path, greys(9))
    assert clip(Video(path), "s").frames == 9


def test_few_frames_that_a_header_counts_too_many_are_the_last_one(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", greys(10))
    found = video_files.frames(path, [8, 9, 10, 11], 12, "it")
    assert np.array_equal(np.asarray(found[1]), np.asarray(found[3]))
    with pytest.raises(DataError, match="ends after 10 of 13 frames"):
        video_files.frames(path, [12], 13, "it")


def _cut(folder: Path) -> Path:
    """Return a file whose header stands in front, and whose end is missing."""
    av = pytest.importorskip("av")
    path = folder / "cut.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        draw = np.random.default_rng(0)
        for _ in range(60):
            noise = draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _sound(folder: Path) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder / "sound.mp4"


def _made(name: str, folder: Path) -> Any:
    pytest.importorskip("av")
    (folder / "empty").mkdir()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video\n" * 100)
    whole = write_video(folder / "whole.mp4", greys(30))
    (folder / "tail.mp4").write_bytes(whole.read_bytes()[:-700])
    write_video(folder / "thin.mp4", greys(2, (1000, 2)))
    address = f"data:video/mp4;base64,{b64encode(b'x' * 9).decode()}!"
    return {
        "missing": folder / "none.mp4", "empty file": folder / "empty.mp4", "no bytes": b"",
        "empty folder": folder / "empty", "no video": folder / "text.mp4",
        "without its end": folder / "tail.mp4", "thin": folder / "thin.mp4", "no frames": (),
        "a number": 3, "base64": address,
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing", "none.mp4 of s does not exist; check the folder of videos"),
        ("empty file", "empty.mp4 of s is empty; fetch it again"),
        ("no bytes", "the video of s is empty"),
        ("empty folder", "is a folder without images"),
        ("no video", "text.mp4 of s cannot be decoded"),
        (
            "without its end",
            "tail.mp4 of s (cannot be decoded .* it may be truncated|is not a video|has no video)",
        ),
        ("thin", "one side is more than 200 times the other"),
        ("no frames", "the video of s has no frames"),
        ("a number", "the video of s has no frames; give a file, a folder, or images"),
        ("base64", "no address of base64"),
    ],
)
def test_what_is_broken_is_a_sentence(tmp_path: Path, name: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        check_video(Video(_made(name, tmp_path)), "s")


def test_a_file_that_is_cut_is_found_by_its_packets(tmp_path: Path) -> None:
    path = _cut(tmp_path)
    assert clip(Video(path), "s").frames == 60  # its header says so
    for thorough in (False, True):
        with pytest.raises(
            DataError, match=r"cut.mp4 of s (ends after \d+ of 60|cannot be decoded)"
        ):
            check_video(Video(path), "s", thorough=thorough)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no video in it"):
        clip(Video(_sound(tmp_path)), "s")


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    """Such a file names others, and addresses: FFmpeg alone would open them."""
    secret = write_video(tmp_path / "secret.ts", greys(10), codec="libx264")
    lines = [
        "#EXTM3U",
        "#EXT-X-TARGETDURATION:10",
        "#EXTINF:10,",
        secret.as_uri(),
        "#EXT-X-ENDLIST",
    ]
    (tmp_path / "list.m3u8").write_text("\n".join(lines))
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{secret}'\n")
    for name in ("list.m3u8", "list.mp4"):
        for source in (tmp_path / name, (tmp_path / name).read_bytes()):
            with pytest.raises(
                DataError, match=r"is not a video that PyAV can read|cannot be decoded"
            ):
                clip(Video(source), "s")


def test_what_would_take_hours_to_decode_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", greys(30))
    monkeypatch.setattr("llavakit_plugins.media.videos.MAX_PIXELS", 64 * 48 * 20)
    assert len(frames(Video(path), [0, 19], "s")) == 2
    with pytest.raises(DataError, match="more than is safe to decode; cut or shrink it"):
        frames(Video(path), [0, 29], "s")


def _growing(path: Path, sizes: list[tuple[int, int]]) -> Path:
    """Write JPEG images as the frames of a video whose header knows the first one's size."""
    av: Any = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height = sizes[0]
        stream.pix_fmt = "yuvj420p"
        stream.codec_context.open()
        for number, size in enumerate(sizes):
            file = BytesIO()
            Image.new("RGB", size, (200, 30, 30)).save(file, "JPEG")
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = Fraction(1, 10), True
            container.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.avi"])
def test_frames_are_no_larger_than_the_header_says(tmp_path: Path, name: str) -> None:
    small, larger, large = (96, 72), (120, 90), (3000, 2000)
    same = _growing(tmp_path / name, [small] * 4)
    assert [image.size for image in frames(Video(same), [0, 3], "s")] == [small] * 2
    path = _growing(tmp_path / name, [small, small, larger, small])
    assert len(frames(Video(path), [0, 1], "s")) == 2
    with pytest.raises(DataError, match="a frame of 120x90 pixels, and its header says 96x72"):
        frames(Video(path), [0, 3], "s")
    path = _growing(tmp_path / name, [small, large])
    with pytest.raises(DataError, match="or a frame larger than the header says"):
        frames(Video(path), [1], "s")  # which FFmpeg does not decode
    with pytest.raises(DataError, match="or a frame larger than the header says"):
        check_video(Video(path), "s", thorough=True)


def test_addresses_may_have_line_ends_and_escapes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", greys(12))
    for written in (encodebytes(path.read_bytes()).decode(), quote(b64encode(path.read_bytes()))):
        assert len(frames(Video(f"data:video/mp4;base64,{written}"), [0, 11], "s")) == 2


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"needs PyAV .* `pip install 'llavakit\[video\]'`"):
        clip(Video(path), "s")
    folder = write_frames(tmp_path / "clip", greys(3))
    assert len(frames(Video(folder), [0, 2], "s")) == 2


@pytest.mark.parametrize("name", ["a.mp4", "c.webm", "e.avi", "f.ts"])
def test_damaged_files_give_frames_or_a_sentence(tmp_path: Path, name: str) -> None:
    whole = write_video(tmp_path / name, moving(12), codec=CODECS[name]).read_bytes()
    draw = np.random.default_rng(0)
    said = [_read(Video(whole[:40]))]  # the others may all have frames: MPEG-TS mends much
    for _ in range(60):
        data = bytearray(whole)
        begin = 400 if draw.random() < 0.5 else len(data)  # every other one within its head
        for at in draw.integers(0, begin, draw.integers(1, 30)):
            data[at] = draw.integers(0, 256)
        said.append(_read(Video(bytes(data[: draw.integers(len(data) // 2, len(data) + 1)]))))
    assert {sentence[:14] for sentence in said if sentence} == {"the video of s"}


def _read(video: Video) -> str:
    """Read a video; return why it cannot be read, where that is so."""
    try:
        header = clip(video, "s")
        assert len(frames(video, [0, header.frames - 1][-header.frames :], "s")) == min(
            2, header.frames
        )
        check_video(video, "s")
    except DataError as error:
        return str(error)
    return ""


MATRICES = [
    (1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1),
    (0, 1, 1, 0), (0, -1, -1, 0),
]  # fmt: skip


def held(path: Path, matrix: tuple[int, ...]) -> Path:
    """Have a file say how its camera was held: the matrix of a track's header (ISO 14496-12)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def turned(pixels: Any, matrix: tuple[int, ...]) -> Any:
    """Return pixels `[H, W, 3]` moved as the matrix says, each by itself."""
    height, width, _ = pixels.shape
    a, b, c, d = matrix
    y, x = np.mgrid[:height, :width]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    found = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    found[to_y, to_x] = pixels
    return found


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_phone_s_video_is_turned_upright_where_that_is_asked_for(
    tmp_path: Path, matrix: tuple[int, ...]
) -> None:
    path = held(write_video(tmp_path / "a.mp4", moving(5)), matrix)
    lies = [np.asarray(image) for image in frames(Video(path), [0, 3], "s")]
    assert clip(Video(path), "s") == Clip(64, 48, 5, 10.0)
    assert lies[0].shape == (48, 64, 3)
    expected = [turned(pixels, matrix) for pixels in lies]
    height, width, _ = expected[0].shape
    for source in (path, path.read_bytes()):
        assert clip(Video(source), "s", upright=True) == Clip(width, height, 5, 10.0)
        found = frames(Video(source), [0, 3], "s", upright=True)
        assert np.array_equal(np.stack([np.asarray(image) for image in found]), expected)


def test_an_odd_angle_is_left_as_it_is(tmp_path: Path) -> None:
    path = held(write_video(tmp_path / "a.mp4", moving(2)), (1, 1, -1, 1))
    (found,) = frames(Video(path), [0], "s", upright=True)
    assert found.size == (64, 48)


def test_a_folder_of_photos_is_turned_as_photos_are(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(2):
        Image.fromarray(moving(1)[0]).save(tmp_path / f"{number}.jpg", exif=exif)
    assert clip(Video(tmp_path), "s", upright=True) == Clip(48, 64, 2, 0.0)
    assert clip(Video(tmp_path), "s") == Clip(64, 48, 2, 0.0)
    (found,) = frames(Video(tmp_path), [1], "s", upright=True)
    assert found.size == (48, 64)


def test_a_model_that_turns_photos_turns_videos(tmp_path: Path) -> None:
    chosen = {"use": "single", "video": {"frames": 2}}
    tiling = Registry.installed().build(Use[Tiling].model_validate(chosen))
    path = held(write_video(tmp_path / "a.mp4", moving(2)), (0, 1, -1, 0))
    for upright, size in ((False, (64, 48)), (True, (48, 64))):
        views = Views(tiling, View(32, 16), upright)
        (shown,) = views.shown([Video(path)], "s")
        assert (shown.width, shown.height) == size
        assert {view.size for view in views.cut(Video(path), "s", 0)} == {size}
