"""`llava-run predict` asks our own server, and gets what the model answers by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.conftest import Command
from tests.plugins.serving.conftest import Running, serving

pytest.importorskip("openai")

from llavakit.model.folder import save_model


def test_a_server_answers_a_file_as_its_model_does(
    running: Running, tmp_path: Path, llava_run: Command
) -> None:
    rows = []
    for number in range(8):
        row: dict[str, Any] = {"question_id": number, "text": f"what colour is it ? {number}"}
        if number % 2:
            pixels = np.full((20, 24, 3), 30 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
            row["image"] = f"{number}.png"
        rows.append(row)
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(running.model, tmp_path / "model")
    short = ("--max-new-tokens", 7)
    own, served = tmp_path / "own.jsonl", tmp_path / "served.jsonl"
    code, _, err = llava_run("predict", tmp_path / "model", path, own, *short, "--device", "cpu")
    assert code == 0, err
    keyless = ("--set", "keyless=true")
    code, _, err = llava_run("predict", f"{running.url}/v1", path, served, *short, *keyless)
    assert code == 0, err
    texts = [[json.loads(line)["text"] for line in file.read_text().splitlines()]
             for file in (own, served)]  # fmt: skip
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 4


def test_a_server_that_wants_a_key_is_not_taken_for_one_without_models(
    lively: Any,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": 1, "text": "what ?"}\n')
    monkeypatch.setenv("OPENAI_API_KEY", "another-key-of-someone")
    with serving(lively, keys=("the-key-of-this-server",)) as server:
        sentence = refused("predict", f"{server.url}/v1", path, tmp_path / "answers.jsonl")
    assert "--set key_env=NAME" in sentence
    assert not (tmp_path / "answers.jsonl").exists()
