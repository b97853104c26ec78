"""Rows about videos: what they show, what is refused, and what check-data says of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command
from tests.made_videos import greys, write_frames, write_video

from llavakit import DataError, Dataset, Registry, Sample, Use, Video

Check = Callable[..., tuple[int, dict[str, Any]]]


def row(identity: str, question: str, answer: str = "a cat .", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, **more, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_frames(tmp_path / "clip", greys(12))
    write_frames(tmp_path / "other", greys(3))
    return tmp_path


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Sample]:
    (folder / "rows.json").write_text(json.dumps(rows))
    use = {"use": "conversations", "path": str(folder / "rows.json"), **options}
    return list(Registry.installed().build(Use[Dataset].model_validate(use)))


@pytest.fixture
def check(folder: Path, llava_run: Command) -> Check:
    def call(*rows: dict[str, Any], flags: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
        (folder / "rows.json").write_text(json.dumps(rows))
        code, out, err = llava_run("check-data", folder / "rows.json", "--json", *flags)
        assert "Traceback" not in err
        return code, json.loads(out)

    return call


def test_every_form_shows_the_same(folder: Path) -> None:
    clip, other = Video(folder / "clip"), Video(folder / "other")
    image = folder / "clip" / "0.png"
    parts = [{"type": "video", "path": "clip"}, {"type": "text", "text": "what ?"}]
    answer = {"role": "assistant", "content": "a cat ."}
    one = read(
        folder,
        row("mark", "<video>\nwhat ?", video="clip"),
        row("llava-video", "<image>\nwhat ?", video="clip"),
        row("list", "<video>\nwhat ?", videos=["clip"]),
        {"id": "m", "messages": [{"role": "user", "content": parts}, answer]},
        {
            "id": "n",
            "video": "clip",
            "messages": [{"role": "user", "content": "<video>\nwhat ?"}, answer],
        },
    )
    assert {sample.turns[0].text for sample in one} == {"<image>\nwhat ?"}
    assert [sample.images for sample in one] == [(clip,)] * 5
    mixed = "<video> <image> <video> what ?"
    (several,) = read(folder, row("s", mixed, image="clip/0.png", videos=["clip", "other"]))
    assert several.images == (clip, image, other)
    (late,) = read(folder, row("l", "<image> <image> what ?", image="clip/0.png", video="clip"))
    assert late.images == (image, clip)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (row("bad", "<video>\nwhat ?"), "a `<video>` has no video to show"),
        (row("bad", "what is in <video> here ?"), "a `<video>` has no video to show"),
        (row("bad", "<video>\nwhich tag ?"), "a `<video>` has no video to show"),
        (row("bad", "<image>\n<video>\nwhat ?", image="clip/0.png"), "no video to show"),
        (row("bad", "<video> <video>\nwhat ?", video="clip"), "no video to show"),
        (row("bad", "what ?", video="clip"), "1 image for 0 `<image>`"),
        (row("bad", "<video>\nwhat ?", "<video>\na cat .", video="clip"), "an answer begins"),
        (row("bad", "what ?", "a cat . <video>"), "an answer begins or ends with `<video>`"),
        (row("bad", "<video>\nwhat ?", video="../clip"), "video `../clip` of .* lies outside"),
        (row("bad", "<video>\nwhat ?", video=3), "`video` is a path, or a list of paths"),
        (row("bad", "<video>\nwhat ?", video=" "), "`video` is an empty text"),
        (row("bad", "<video>\nwhat ?", video="clip", videos=["clip"]), "`video` and `videos`"),
        (row("bad", "<video>\nwhat ?", video="none"), "none .* are missing|check the folder"),
        (row("bad", "<video>\nwhat ?", video="data:video/mp4;base64,%"), "no address of base64"),
        (row("bad", "what ?", video_path="clip"), "`video_path` is not read"),
    ],
)
def test_no_video_becomes_text(folder: Path, check: Check, bad: Any, sentence: str) -> None:
    good = row("good", "<video>\nwhat ?", video="clip")
    with pytest.raises(DataError, match=sentence) as caught:
        read(folder, good, bad)
    assert "bad" in str(caught.value)
    assert [sample.id for sample in read(folder, good, bad, unusable="skip")] == ["good"]
    code, report = check(good, bad)
    assert code == 2
    assert any("`bad`" in text for found in report["findings"] for text in found["messages"])


def test_talk_of_html_is_text(folder: Path, check: Check) -> None:
    rows = [
        row("tag", "what does the tag <video> do ?", "it shows one ."),
        row("code", "fix this : <video><source src=a></video>", "use <video> with controls ."),
    ]
    assert [sample.images for sample in read(folder, *rows)] == [(), ()]
    assert check(*rows)[0] == 0


def test_videos_are_counted_and_broken_ones_named(folder: Path, check: Check) -> None:
    whole = write_video(folder / "whole.mp4", greys(20))
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[:900])
    (folder / "empty.mp4").touch()
    (folder / "nothing").mkdir()
    names = ["whole.mp4", "clip", "whole.mp4", "cut.mp4", "empty.mp4", "nothing", "none.mp4"]
    rows = [row(name + str(n), "<video>\nwhat ?", video=name) for n, name in enumerate(names)]
    tiling = ("--tiling", "single", "video.frames=8")
    code, report = check(*rows, flags=tiling)
    assert code == 2
    assert (report["videos"], report["distinct_videos"], report["images"]) == (7, 6, 0)
    counts = {found["sort"]: found["count"] for found in report["findings"]}
    assert counts == {"broken videos": 3, "missing videos": 1}
    code, report = check(*rows[:3], flags=tiling)
    assert code == 0
    # 256 embeddings are 8 x 8 a frame, of 8 frames, and a learned row behind them
    assert report["tokens"]["longest"] > 8 * 64 + 1 > report["tokens"]["longest"] - 20
    code, report = check(*rows[:3])  # without a tiling that shows them
    assert (code, report["samples"]) == (0, 3)
    (found,) = report["findings"]
    assert found["sort"] == "videos that are not shown"
    assert "the tiling `single` shows none" in found["messages"][0]


def test_every_frame_is_decoded_if_asked(folder: Path, check: Check) -> None:
    path = folder / "other" / "1.png"
    path.write_bytes(path.read_bytes()[:-40])
    flags = ("--thorough", "--tiling", "single", "video.frames=8")
    code, report = check(row("bad", "<video>\nwhat ?", video="other"), flags=flags)
    assert code == 2
    (found,) = report["findings"]
    assert "other/1.png of sample `bad`" in found["messages"][0]
