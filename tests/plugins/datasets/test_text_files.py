"""Files that users write: a byte order mark in front of one is no part of its text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llavakit import DataError
from llavakit_plugins.chat_models.secret import read_key
from llavakit_plugins.datasets.scienceqa_problems import read_problems
from llavakit_plugins.datasets.text_files import open_text, read_text
from llavakit_plugins.evaluation.questions import read_questions
from llavakit_plugins.generators.prompts import load_prompt


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_mark_is_no_part_of_what_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "file"
    path.write_text("é\n", encoding=encoding)
    assert read_text(path) == "é\n"
    with open_text(path) as file:
        assert file.readline() == "é\n".encode()
    path.write_text("sk-0123456789", encoding=encoding)
    assert read_key("NONE", path) == "sk-0123456789"
    path.write_text('{"question_id": 1, "text": "what ?"}', encoding=encoding)
    assert read_questions(path, None)[0].question.prompt == "what ?"
    problem = {"question": "q", "choices": ["a"], "answer": 0, "subject": "natural science",
               "grade": "grade3"}  # fmt: skip
    path.write_text(json.dumps({"7": problem}), encoding=encoding)
    assert list(read_problems(path)) == ["7"]
    folder = tmp_path / "prompts" / "reasoning"
    folder.mkdir(parents=True)
    (folder / "system.txt").write_text("You see.\r\nAsk.", encoding=encoding)
    prompt = load_prompt("reasoning", tmp_path / "prompts")
    assert prompt.system == "You see.\nAsk."


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match=f"cannot read {place}: it is no regular file"):
            open_text(place)
    with pytest.raises(DataError, match=r"cannot read .*none: No such file"):
        read_text(tmp_path / "none")
    (tmp_path / "file").write_text("é", encoding="utf-16")
    with pytest.raises(DataError, match=r"is not UTF-8 text \(byte 0\); convert it"):
        read_text(tmp_path / "file")
