"""Clients ask about videos: within the request, within limits, and about nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.made_videos import greys, write_frames, write_video
from tests.plugins.onnx_models import make_model
from tests.plugins.serving.conftest import LIVELY, Json, Running, data_url, picture, serving

from llavakit import LlavaModel, Video

TILING = {"use": "single", "video": {"frames": 4}}


@pytest.fixture(scope="module")
def shows() -> LlavaModel:
    return make_model(LIVELY, tiling=TILING)


@pytest.fixture(scope="module")
def server(shows: LlavaModel) -> Iterator[Running]:
    with serving(shows) as running:
        yield running


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    return write_video(path, greys(12)).read_bytes()


def asks(*parts: Json) -> list[Json]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it ?"}]}]


def video(data: bytes, kind: str = "video/mp4") -> Json:
    return {"type": "video_url", "video_url": {"url": data_url(data, kind)}}


def image(data: bytes) -> Json:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def test_an_openai_client_asks_about_a_video(
    server: Running, shows: LlavaModel, clip: bytes
) -> None:
    photo = picture(1)
    cases: list[tuple[list[Json], list[Any]]] = [
        ([video(clip)], [Video(clip)]),
        ([image(photo), video(clip)], [photo, Video(clip)]),
        ([video(clip), image(photo), video(clip)], [Video(clip), photo, Video(clip)]),
    ]
    for parts, given in cases:
        marks = "".join("<video>\n" if isinstance(one, Video) else "<image>\n" for one in given)
        expected = shows.generate(f"{marks}what is it ?", given, max_new_tokens=12)
        messages: Any = asks(*parts)
        answer = server.client().chat.completions.create(
            model="small", messages=messages, max_tokens=12
        )
        assert answer.choices[0].message.content == expected
        assert answer.usage.prompt_tokens == shows.prompt(
            f"{marks}what is it ?", given
        ).length(shows.visual_tokens)  # fmt: skip


@pytest.mark.parametrize("key", ["video", "url", "path", "base64", "video_url"])
def test_files_of_the_machine_are_not_read(server: Running, key: str, tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "secret", greys(3))
    for named in (str(folder), folder.as_uri(), "/etc/passwd", "http://127.0.0.1:9/a.mp4", "", 3):
        given: Any = {"url": named} if key == "video_url" else named
        status, body = server.chat(messages=asks({"type": "video", key: given}))
        assert status == 400
        said = body["error"]["message"]
        known = ("reads no files", "base64", "cannot be decoded", "is empty")
        assert any(sentence in said for sentence in known), said
        assert "secret" not in said


def test_what_is_no_video_or_too_much_is_an_error(
    shows: LlavaModel, clip: bytes, tmp_path: Path
) -> None:
    with serving(shows, images=2, video_pixels=64 * 48 * 11) as server:
        for parts, sentence in (
            ([video(clip)], "a video has more than 33792 pixels in all frames"),
            ([video(b"nothing")], "the video of the request cannot be decoded"),
            ([video(b"#EXTM3U\nfile:///etc/passwd\n")], "cannot be decoded"),
            ([image(picture(1))] * 3, "at most 2 images"),
            ([{"type": "text", "text": "<video>"}], "a `<video>` has no video to show"),
        ):
            status, body = server.chat(messages=asks(*parts))
            assert status == 400
            assert sentence in body["error"]["message"]
        few = write_video(tmp_path / "few.mp4", greys(3)).read_bytes()
        assert server.chat(messages=asks(video(few), video(few)), max_tokens=2)[0] == 200
        assert server.chat(messages=asks(*[video(few)] * 3))[0] == 400


def test_a_model_without_videos_says_so(running: Running, clip: bytes) -> None:
    status, body = running.chat(messages=asks(video(clip)))
    assert status == 400
    assert "shows a video, and the tiling `single` shows none" in body["error"]["message"]


def test_heat_maps_of_videos_are_refused(server: Running, clip: bytes) -> None:
    asked = {"messages": asks(video(clip)), "answer": "it is red ."}
    status, _, data = server.send("/v1/heatmaps", asked)
    assert status == 400
    assert "images, not videos" in json.loads(data)["error"]["message"]
