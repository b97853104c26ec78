"""`llava-run chat --video`, `/video` in a dialogue, and `predict` on questions about videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command
from tests.made_videos import greys, write_frames, write_video
from tests.plugins.onnx_models import make_model

import llavakit
from llavakit import Video, save_model
from llavakit_plugins.commands.dialogue import Dialogue


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, which shows videos, `clip`, frames, and `photo.png`."""
    folder = tmp_path_factory.mktemp("chat")
    save_model(make_model(tiling={"use": "single", "video": {"frames": 3}}), folder / "model")
    frames = write_frames(folder / "clip", greys(5))
    (folder / "photo.png").write_bytes((frames / "2.png").read_bytes())
    return folder


def test_chat_shows_a_video(folder: Path, llava_run: Command) -> None:
    model: Any = llavakit.load(folder / "model")
    clip = Video(folder / "clip")
    for prompt in ("what is it ?", "what is in <video> ?"):
        asked = llava_run("chat", folder / "model", "--video", folder / "clip", "--prompt", prompt,
                          "--max-new-tokens", 8)  # fmt: skip
        assert asked.code == 0, asked.err
        assert asked.out.strip() == model.generate(prompt, [clip], max_new_tokens=8).strip()
    both = llava_run("chat", folder / "model", "--video", folder / "clip", "--image",
                     folder / "photo.png", "--prompt", "<video> <image> what ?",
                     "--max-new-tokens", 8)  # fmt: skip
    given = [clip, folder / "photo.png"]
    expected = model.generate("<video> <image> what ?", given, max_new_tokens=8)
    assert both.out.strip() == expected.strip()


def test_what_cannot_be_shown_is_a_sentence(
    folder: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    chat = ("chat", folder / "model", "--prompt", "what ?")
    assert "none.mp4 of the prompt does not exist" in refused(
        *chat, "--video", tmp_path / "none.mp4"
    )
    heatmap = (*chat, "--video", folder / "clip", "--image", folder / "photo.png")
    assert "leave --video out" in refused(*heatmap, "--heatmap", tmp_path / "map.png")
    save_model(make_model(), tmp_path / "plain")
    said = refused("chat", tmp_path / "plain", "--prompt", "what ?", "--video", folder / "clip")
    assert "the prompt shows a video, and the tiling `single` shows none" in said


def test_a_dialogue_names_its_videos(folder: Path, tmp_path: Path) -> None:
    model: Any = llavakit.load(folder / "model")
    dialogue = Dialogue(model, {"max_new_tokens": 4}, [], None, lambda name: name)
    assert (
        dialogue.run(f"/video {folder / 'clip'}")
        == "64 x 48 pixels, 5 frames, for the next question"
    )
    dialogue.run(f"/image {folder / 'photo.png'}")
    first = "".join(dialogue.ask("<image> <video> what ?"))
    given = [folder / "photo.png", Video(folder / "clip")]
    assert first == model.generate("<image> <video> what ?", given, max_new_tokens=4)
    dialogue.run(f"/save {tmp_path / 'rows.json'}")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    parts = [part for part in row["messages"][0]["content"] if part["type"] != "text"]
    assert [part["type"] for part in parts] == ["image", "video"]
    assert parts[1]["video"] == str(folder / "clip")
    with pytest.raises(llavakit.DataError, match="does not exist"):
        dialogue.run("/video none.mp4")


def test_questions_of_files_are_about_videos(
    folder: Path, llava_run: Command, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mp4", greys(6))
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "what ?"}]
    rows = [
        {"question_id": 1, "video": "a.mp4", "text": "what ?"},
        {"question_id": 2, "video": "a.mp4", "text": "<video>\nwhat ?"},
        {"id": 3, "messages": [{"role": "user", "content": parts}]},
        {
            "id": 4,
            "video": "a.mp4",
            "conversations": [{"from": "human", "value": "<video>\nwhat ?"}],
        },
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = llava_run("predict", folder / "model", tmp_path / "asked.jsonl",
                      tmp_path / "answers.jsonl", "--max-new-tokens", 6)  # fmt: skip
    assert asked.code == 0, asked.err
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    model: Any = llavakit.load(folder / "model")
    expected = model.generate("<video>\nwhat ?", [Video(path)], max_new_tokens=6)
    assert [row["text"] for row in answers] == [expected] * 4
    (tmp_path / "b.jsonl").write_text(json.dumps({**rows[0], "video": "none.mp4"}))
    missing = llava_run("predict", folder / "model", tmp_path / "b.jsonl", tmp_path / "b-out.jsonl")
    assert missing.code == 2
    assert "none.mp4 of question `1`" in missing.err
