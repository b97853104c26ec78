"""The code of docs/asking.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.made_videos import greys, write_video
from tests.plugins.onnx_models import make_model

import llavakit

PAGE = Path(__file__).parents[2] / "docs" / "asking.md"


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 5
    model = make_model(
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
         "max_position_embeddings": 1024},
        tiling={"use": "single", "video": {"frames": 4}},
    )  # fmt: skip
    monkeypatch.setattr(llavakit, "load", lambda _, **__: model)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("photo.jpg")
    write_video(Path("clip.mp4"), greys(6))
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert [message["role"] for message in names["messages"]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert names["sample"].system == "You answer in one sentence."


def test_the_page_names_every_option_of_sampling() -> None:
    text = PAGE.read_text(encoding="utf-8")
    from llavakit.contracts.model import SamplingOptions

    assert [name for name in SamplingOptions.__annotations__ if f"`{name}`" not in text] == []
