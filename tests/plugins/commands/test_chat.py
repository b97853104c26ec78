"""`llava-run chat` on a terminal, driven as a person does."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.conftest import Command, make_tokenizer
from tests.plugins.onnx_models import HEADS_OF_16, make_model, make_pictures

import llavakit
from llavakit import LlavaModel, save_model

ROOT = Path(__file__).parents[3]
NEW = ["--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    size = {"vocab_size": len(make_tokenizer()), "max_position_embeddings": 1024}
    save_model(make_model({**HEADS_OF_16, **size}), folder / "model")
    make_pictures(folder)  # 0.png and 1.png
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LlavaModel:
    return llavakit.load(folder / "model", device="cpu")  # type: ignore[no-any-return]


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.end, theirs = pty.openpty()
        words = [sys.executable, "-m", "llavakit.cli", *map(str, arguments)]
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "400", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment,
            start_new_session=True, preexec_fn=lambda: _take_terminal(),
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 240) -> str:
        """Return what came up to the pattern, which is then done with."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < until, f"no {pattern!r} in {self.text!r}"
            if select.select([self.end], [], [], 0.2)[0]:
                try:
                    more = os.read(self.end, 65536)
                except OSError:  # the other end is closed
                    more = b""
                assert more, f"the chat ended: {self.text!r}"
                self.text += more.decode().replace("\r\n", "\n")
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def type(self, keys: str) -> str:
        """Type a line, and return what is there until the next prompt."""
        os.write(self.end, f"{keys}\r".encode())
        return self.wait_for(r"\n> ")

    def interrupt(self) -> int:
        """Press Ctrl-C at the prompt until the chat ends, as people do; return its exit code.

        CPython waits for a key where the signal comes between the prompt and that wait, which is a
        moment, but may be a long one on a loaded machine.
        """
        until = time.monotonic() + 60
        while (code := self.process.poll()) is None:
            assert time.monotonic() < until, "the chat goes on"
            with suppress(subprocess.TimeoutExpired, OSError):  # or it has just ended
                os.write(self.end, b"\x03")
                self.process.wait(5)
        return code

    def close(self) -> int:
        os.write(self.end, b"\x04")
        code = self.process.wait(60)
        os.close(self.end)
        return code


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    picture = folder / "0.png"
    arguments = ["--image", picture, "--system", "a red circle", "--verbose", *NEW]
    running = Terminal("chat", folder / "model", *arguments)
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()


def image(path: Path) -> dict[str, str]:
    return {"type": "image", "image": str(path)}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_a_dialogue_as_a_person_leads_it(
    terminal: Terminal, folder: Path, model: LlavaModel
) -> None:
    one, two = folder / "0.png", folder / "1.png"
    expected: list[dict[str, Any]] = [{"role": "system", "content": "a red circle"}]

    def asks(content: Any) -> str:
        expected.append({"role": "user", "content": content})
        answer = model.generate(expected, max_new_tokens=6)
        expected.append({"role": "assistant", "content": answer})
        return answer

    terminal.wait_for("> ")
    first = asks([image(one), text("what colour is it ?")])
    shown = terminal.type("what colr\x7four is it ?")  # corrected while it is typed
    assert first
    assert f"\n{first}\n" in shown
    assert re.search(r"\[\d+ tokens, (\d+\.\d tokens/s|no rate), first after \d+\.\d\d s\]", shown)
    assert "error: image none.png of the next question does not" in terminal.type("/image none.png")
    assert "33 x 64 pixels" in terminal.type(f'/image "{two}"')
    second = asks([image(two), text("what shape is it ?")])
    assert f"\n{second}\n" in terminal.type("what shape is it ?")
    third = asks("what shape is it ?")
    assert f"\n{third}\n" in terminal.type("\x1b[A")  # the line before
    assert "there is no command `/sav`; did you mean `/save`?" in terminal.type("/sav x")
    assert "/save FILE" in terminal.type("/help")
    assert "error: " in terminal.type("<image> is it ?")  # no image for it: nothing changes
    file = folder / "said.json"
    assert "written to" in terminal.type(f"/save {file}")
    assert "is there already" in terminal.type(f"/save {file}")
    (row,) = json.loads(file.read_text())
    assert row == {"id": "said", "messages": expected}
    terminal.type("/system a blue square")
    terminal.type("/reset")
    assert "33 x 64 pixels" in terminal.type(f"/image {two.as_uri()}")
    terminal.type("what is it ?")
    terminal.type(f"/save {folder / 'again.json'}")
    (row,) = json.loads((folder / "again.json").read_text())
    content = [image(one), image(two), text("what is it ?")]  # as training reads them, by path
    begin = [expected[0], {"role": "user", "content": content}]
    assert row["messages"][:2] == begin
    assert row["messages"][2]["content"] == model.generate(begin, max_new_tokens=6)
    assert terminal.close() == 0


def test_an_answer_is_stopped_and_the_chat_goes_on(folder: Path) -> None:
    running = Terminal("chat", folder / "model", "--max-new-tokens", 900, "--device", "cpu")
    try:
        running.wait_for("> ")
        os.write(running.end, b"what is it ?\r")
        running.wait_for(r"is it \?\n.+")  # the answer has begun
        os.write(running.end, b"\x03")
        running.wait_for(r"\[stopped\]\n> ")
        running.type(f"/save {folder / 'stopped.json'}")
        (row,) = json.loads((folder / "stopped.json").read_text())
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][1]["content"]
        assert running.interrupt() == 128 + signal.SIGINT  # at the prompt it ends the chat
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
        os.close(running.end)


def test_bytes_that_are_no_text_are_named(folder: Path, refused: Callable[..., str]) -> None:
    found = refused("chat", folder / "model", "--prompt", "a\udcff")
    assert "the question is no text in UTF-8" in found


def test_one_question_takes_every_flag(folder: Path, model: LlavaModel, llava_run: Command) -> None:
    pictures = [folder / "0.png", folder / "1.png"]
    flags = ["--temperature", 2.0, "--seed", 3, "--top-k", 9, "--min-p", 0.01, "--stop", "circle"]
    flags += ["--repetition-penalty", 1.3, "--presence-penalty", 0.5, "--system", "a blue square"]
    shown = [word for picture in pictures for word in ("--image", picture)]
    asked = ["--prompt", "what is it ?", "--verbose", *flags, *shown, *NEW]
    code, out, err = llava_run("chat", folder / "model", *asked)
    expected = model.generate(
        [
            {"role": "system", "content": "a blue square"},
            {"role": "user", "content": "<image>\n<image>\nwhat is it ?"},
        ],
        pictures,
        max_new_tokens=6, temperature=2.0, seed=3, top_k=9, min_p=0.01, repetition_penalty=1.3,
        presence_penalty=0.5, stop=["circle"],
    )  # fmt: skip
    assert (code, out) == (0, f"{expected}\n")
    assert re.fullmatch(r"\[\d+ tokens, .*, first after \d+\.\d\d s\]\n", err)


def test_a_photo_is_turned_and_a_host_allowed_by_a_flag(
    folder: Path, model: LlavaModel, llava_run: Command, tmp_path: Path
) -> None:
    note = Image.Exif()
    note[0x0112] = 6
    Image.open(folder / "0.png").save(tmp_path / "turned.png", exif=note)
    asked = ["chat", folder / "model", "--prompt", "what is it ?", *NEW]
    turned = Image.open(folder / "0.png").convert("RGB").transpose(Image.Transpose.ROTATE_270)
    expected = model.generate("what is it ?", [turned], max_new_tokens=6)
    out = llava_run(*asked, "--image", tmp_path / "turned.png", "--upright").out
    assert out == f"{expected}\n"
    code, _, err = llava_run(*asked, "--image", "https://a.org/b.png")
    assert code == 2
    assert "images of the host `a.org` are not allowed here; allow it" in err
    code, _, err = llava_run(*asked, "--image", "https://a.org/b.png", "--heatmap", "x.png")
    assert code == 2
