"""Rows of messages, as transformers' chat templates take them, and system texts in any row."""

from __future__ import annotations

import json
from base64 import b64encode
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from tests.conftest import CHATML, Command, make_tokenizer

from llavakit import DataError, Dataset, PromptTemplate, Registry, Sample, Turn, Use, encode
from llavakit_plugins.datasets.conversation_rows import RowReader

TEXT = {"type": "text", "text": "what is it ?"}
RED = {"role": "assistant", "content": "it is red ."}


def build(path: Path, **options: Any) -> Dataset:
    use = {"use": "conversations", "path": str(path), **options}
    return Registry.installed().build(Use[Dataset].model_validate(use))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        Image.effect_noise((20, 20), 50).save(tmp_path / f"{name}.png")
    return tmp_path


def one(folder: Path, row: dict[str, Any]) -> Sample:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    (sample,) = build(path)
    return sample


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "messages": [{"role": "user", "content": "<image>\nwhat is it ?"}]},
        {"images": ["a.png"], "messages": [user({"type": "image"}, TEXT)]},
        {"messages": [user({"type": "image", "image": "a.png"}, TEXT)]},
        {"messages": [user({"type": "image", "path": "a.png"}, TEXT)]},
        {"messages": [user({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT)]},
    ],
)
def test_an_image_is_named_in_the_row_or_in_a_part(folder: Path, row: dict[str, Any]) -> None:
    sample = one(folder, {"id": "x", "messages": [*row.pop("messages"), RED], **row})
    turns = (Turn("human", "<image>\nwhat is it ?"), Turn("gpt", "it is red ."))
    assert sample == Sample("x", turns, (folder / "a.png",))


def test_an_image_may_stand_in_the_file_itself(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    url = f"data:image/png;base64,{b64encode(data).decode()}"
    for part in ({"type": "image", "url": url}, {"type": "image_url", "image_url": {"url": url}}):
        sample = one(folder, {"messages": [user(part, TEXT), RED]})
        assert sample.images == (data,)
    sample = one(folder, {"image": url, "messages": [user({"type": "image"}, TEXT), RED]})
    assert sample.images == (data,)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("mark", [b"", BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_files_as_people_write_them(folder: Path, name: str, mark: bytes, end: bytes) -> None:
    rows = [
        {"id": "m", "images": ["b.png"], "messages": [user({"type": "image"}, TEXT), RED]},
        {"id": "c", "conversations": [{"from": "human", "value": "é ?"},
                                      {"from": "gpt", "value": "ja"}]},
    ]  # fmt: skip
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    text = end.join(lines) if name.endswith("l") else b"[" + (b"," + end).join(lines) + b"]" + end
    (folder / name).write_bytes(mark + text)
    data = build(folder / name)
    assert [sample.id for sample in data] == ["m", "c"]
    assert data[1].turns[0].text == "é ?"
    assert data[0].images == (folder / "b.png",)
    stated = type(data).Options.model_validate({"path": folder / name})
    expected = type(data).expect(stated)
    assert expected is not None
    assert expected[0] == 2
    assert expected[1] > 0


SYSTEMS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "be brief"}, user(TEXT), RED]},
    {"system": "be brief", "messages": [user(TEXT), RED]},
    {"system": "be brief", "conversations": [{"from": "human", "value": "what is it ?"},
                                             {"from": "gpt", "value": "it is red ."}]},
    {"conversations": [{"from": "system", "value": "be brief"},
                       {"from": "human", "value": "what is it ?"},
                       {"from": "gpt", "value": "it is red ."}]},
]  # fmt: skip


@pytest.mark.parametrize("row", SYSTEMS)
def test_a_system_text_is_trained_as_transformers_renders_it(
    folder: Path, row: dict[str, Any]
) -> None:
    sample = one(folder, row)
    assert sample.system == "be brief"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    use = Use[PromptTemplate].model_validate({"use": "chat-template"})
    item = encode(sample, Registry.installed().build(use), tokenizer)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is it ?"},
        RED,
    ]
    assert item.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [RED]}, "message 1 is from 'assistant', expected `user`"),
    ({"messages": [user(TEXT), user(TEXT)]}, "message 2 is from 'user', expected `assistant`"),
    ({"messages": []}, "`messages` are no list of `role` and `content`"),
    ({"messages": "hello"}, "`messages` are no list of `role` and `content`"),
    ({"messages": [{"role": "tool", "content": "x"}, RED]}, "is from 'tool'"),
    (
        {"messages": [user({"type": "audio", "audio": "a.mp3"}), RED]},
        "no text, and no image or video of the user's",
    ),
    ({"messages": [user({"type": "image"}), RED]}, "show more images than are given with them"),
    ({"image": "a.png", "messages": [user(TEXT), RED]}, "1 image for 0 `<image>` placeholders"),
    ({"messages": [user({"type": "image", "image": "../a.png"}), RED]}, "lies outside"),
    ({"messages": [user({"type": "image", "image": "/etc/passwd"}), RED]}, "lies outside"),
    ({"messages": [user({"type": "image", "image": 5}), RED]}, "an image is a path"),
    ({"messages": [user({"type": "image", "url": "data:image/png;base64,%%"}), RED]}, "base64"),
    ({"messages": [user(TEXT), RED], "conversations": []}, "keep one of them"),
    ({"messages": [{**user(TEXT), "images": ["a.png"]}, RED]}, "`images` is not read"),
    ({"system": "a", **SYSTEMS[0]}, "keep one of them"),
    ({"system": 5, "messages": [user(TEXT), RED]}, "`system` is a text, got 5"),
    ({**SYSTEMS[3], "system": "a"}, "keep one system text"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_what_cannot_be_trained_on_is_named(
    folder: Path, row: dict[str, Any], said: str, llava_run: Command
) -> None:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"id": "odd one", **row}))
    with pytest.raises(DataError) as error:
        build(path)
    assert said in str(error.value)
    assert "sample `odd one` of" in str(error.value)
    code, out, _ = llava_run("check-data", path, "--json")
    assert code == 2
    messages = [message for sort in json.loads(out)["findings"] for message in sort["messages"]]
    assert any(said in message for message in messages), messages


def test_images_of_messages_are_looked_at_before_training(
    folder: Path, refused: Callable[..., str], llava_run: Command
) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:200])
    rows = [
        {"id": name, "messages": [user({"type": "image", "image": f"{name}.png"}, TEXT), RED]}
        for name in ("a", "gone", "cut")
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"1 of 3 images are missing: .*gone\.png"):
        build(path)
    data = build(path, unusable="skip")
    assert [sample.id for sample in data] == ["a"]
    code, out, _ = llava_run("check-data", path, "--json")
    report = json.loads(out)
    assert (code, report["missing_images"], report["broken_images"]) == (2, 1, 1)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "system", "text", "image", "a.png", "<image>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "image", "url", "from", "value",
                         "bytes", "path", "base64", "image_url"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
ROWS = st.dictionaries(
    st.sampled_from(["id", "image", "images", "messages", "conversations", "system", "video"]),
    JSON_VALUES,
    max_size=5,
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS)
def test_any_row_is_a_sample_or_a_sentence(row: dict[str, Any]) -> None:
    reader = RowReader("rows.json", Path("/data"))
    found, problems, _ = reader.inspect(row, 0)
    stops = [problem.message for problem in problems if problem.stops]
    assert all("rows.json" in message for message in stops)
    assert bool(stops) == (found is None)
    if found is None:
        with pytest.raises(DataError, match=r"rows\.json"):
            reader.sample(row, 0)
    else:
        assert reader.sample(row, 0) == found
        found.check()
        assert all(isinstance(image, Path | bytes) for image in found.images)
