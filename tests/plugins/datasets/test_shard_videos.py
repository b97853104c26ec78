"""Videos in tar shards: the same as the same files in a folder, for rows of every form."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Command, RecipeWriter
from tests.made_videos import greys, write_video
from tests.plugins.datasets.shards import Members, picture, row, talk, write_tar

from llavakit import DataError, Dataset, Registry, Sample, Use, Video
from llavakit_plugins.media import videos

ASK = talk("<video>\nwhat ?", "a cat .")


@pytest.fixture
def clip(tmp_path: Path) -> bytes:
    return write_video(tmp_path / "clip.mp4", greys(9)).read_bytes()


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Sample]]:
    def call(*members: tuple[str, bytes], **options: Any) -> list[Sample]:
        path = write_tar(tmp_path / "s.tar", members)
        own = {"path": str(path), "index": str(tmp_path / "index"), **options}
        use = Use[Dataset].model_validate({"use": "webdataset", **own})
        return list(Registry.installed().build(use))

    return call


def test_rows_of_every_form_show_them(read: Callable[..., list[Sample]], clip: bytes) -> None:
    parts = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "what ?"}]
    answer = {"role": "assistant", "content": "a cat ."}
    forms: Members = [
        ("a.json", row(conversations=ASK)),
        ("b.json", row(video="far/clip.mp4", conversations=ASK)),
        ("c.json", row(conversations=talk("<image>\nwhat ?", "a cat ."))),
        ("d.json", row(videos=["mp4"], conversations=talk("<image>\nwhat ?", "a cat ."))),
        ("e.json", row(messages=[{"role": "user", "content": parts}, answer])),
    ]
    members = [pair for form in forms for pair in ((f"{form[0][0]}.mp4", clip), form)]
    samples = read(*members, ("f.txt", b"a cat ."), ("f.MP4", clip), questions=["what ?"])
    assert {sample.turns for sample in samples} == {samples[0].turns}
    assert samples[0].turns[0].text == "<image>\nwhat ?"
    for name, sample in zip("abcdef", samples, strict=True):
        (video,) = sample.images
        assert isinstance(video, Video)
        assert str(video.source).endswith(f"/s.tar/{name}.mp4")
        assert pickle.loads(pickle.dumps(video)) == video  # noqa: S301


def test_frames_are_those_of_the_file(
    read: Callable[..., list[Sample]], clip: bytes, tmp_path: Path
) -> None:
    (sample,) = read(("a.mp4", clip), ("a.json", row(conversations=ASK)))
    file, (video,) = Video(tmp_path / "clip.mp4"), sample.images
    assert isinstance(video, Video)
    assert videos.clip(video, "a") == videos.clip(file, "a")
    shown = [np.asarray(frame) for frame in videos.frames(video, [0, 4, 8], "a")]
    for one, other in zip(shown, videos.frames(file, [0, 4, 8], "a"), strict=True):
        assert (one == np.asarray(other)).all()
    assert shown[0].mean() < shown[1].mean() < shown[2].mean()


def test_images_and_videos_of_one_key(read: Callable[..., list[Sample]], clip: bytes) -> None:
    media: Members = [("a.jpg", picture(1, "JPEG")), ("a.0.mp4", clip), ("a.1.mp4", clip)]
    ask = "<video> <image> <video> which ?"
    (both,) = read(*media, ("a.json", row(conversations=talk(ask, "a cat ."))))
    assert [str(getattr(one, "source", one))[-7:] for one in both.images] == [
        "a.0.mp4", "r/a.jpg", "a.1.mp4",
    ]  # fmt: skip
    parts = [{"type": "video"}, {"type": "video"}, {"type": "image"}]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "which ?"}]}
    messages = [asked, {"role": "assistant", "content": "a cat ."}]
    (in_parts,) = read(*media, ("a.json", row(messages=messages)))
    assert [str(getattr(one, "source", one))[-7:] for one in in_parts.images] == [
        "a.0.mp4", "a.1.mp4", "r/a.jpg",
    ]  # fmt: skip
    turns = talk("<video><image> ?", ".")
    (named,) = read(*media, ("a.json", row(video="1.mp4", image="x.jpg", conversations=turns)))
    assert [str(getattr(one, "source", one))[-7:] for one in named.images] == ["a.1.mp4", "r/a.jpg"]
    # a row about the image alone is one, whatever lies beside it; and so is a caption
    for text in (("a.json", row(conversations=talk("<image>\nwhat ?", "."))), ("a.txt", b"a cat")):
        (image,) = read(*media, text)
        assert [str(one)[-5:] for one in image.images] == ["a.jpg"]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.json", row(conversations=ASK))], "a `<video>` has no video to show"),
        ([("a.json", row(video="b.mp4", conversations=ASK))], "has no video beside it"),
        ([("a.0.mp4", b""), ("a.1.mp4", b""), ("a.txt", b"a cat")], "2 videos beside its caption"),
        ([("a.0.mp4", b""), ("a.1.mp4", b""), ("a.json", row(video="b", conversations=ASK))],
         "its videos are a.0.mp4, a.1.mp4; call it one of them"),
        ([("a.mp4", b"not a video"), ("a.json", row(conversations=ASK))], "s.tar/a.mp4 of sample"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(
    read: Callable[..., list[Sample]], members: Members, said: str
) -> None:
    pytest.importorskip("av")
    with pytest.raises(DataError, match="a") as caught:
        read(*members)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_video_is_found_before_training(
    read: Callable[..., list[Sample]], clip: bytes, tmp_path: Path, llava_run: Command
) -> None:
    whole: Members = [("a.mp4", clip), ("a.json", row(conversations=ASK))]
    cut: Members = [("b.mp4", clip[: len(clip) // 2]), ("b.json", row(conversations=ASK))]
    with pytest.raises(DataError, match=r"s\.tar/b\.mp4"):
        read(*whole, *cut)
    assert [sample.id for sample in read(*whole, *cut, unusable="skip")] == ["s.tar/a"]
    code, out, _ = llava_run("check-data", tmp_path / "s.tar", "--dataset", "webdataset", "--json")
    found = json.loads(out)
    assert code == 2
    assert found["videos"] == 2
    stops = [finding["sort"] for finding in found["findings"] if finding["stops"]]
    assert stops == ["broken videos"]


def test_training_from_shards_is_training_from_files(
    clip: bytes, tmp_path: Path, write_recipe: RecipeWriter, llava_run: Command
) -> None:
    rows, members = [], []
    for number in range(8):
        shade = ((220, 30, 30), (30, 30, 220))[number % 2]
        name = f"{number}.mp4"
        write_video(tmp_path / name, [np.full((40, 48, 3), shade, np.uint8)] * (4 + number))
        one = {"id": str(number), "video": name, "conversations": ASK}
        rows.append(one)
        members += [(name, (tmp_path / name).read_bytes()), (f"{number}.json", row(**one))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_tar(tmp_path / "rows.tar", members)
    losses = []
    for kind, suffix in (("conversations", "json"), ("webdataset", "tar")):
        data = f'{{ use = "{kind}", path = "{tmp_path}/rows.{suffix}" }}'
        sets = ['model.tiling={ use = "single", video = { frames = 2 } }', "steps.1.skip=true",
                f"steps.finetune.data={data}", "steps.finetune.epochs=2"]  # fmt: skip
        flags = [flag for one in sets for flag in ("--set", one)]
        code, _, err = llava_run(write_recipe(), "--out", tmp_path / kind, *flags)
        assert code == 0, err
        lines = (tmp_path / kind / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        losses.append([event["loss"] for event in events if event["event"] == "train"])
    assert losses[0] == losses[1]
    assert len(losses[0]) > 1
