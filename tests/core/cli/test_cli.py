"""The command: what it prints where, and its exit codes."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tests.conftest import Command

import llavakit
from llavakit.cli import main


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.effect_noise((40, 40), 60).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_no_arguments_print_the_help(llava_run: Command) -> None:
    code, out, _ = llava_run()
    assert code == 0
    assert "llava-run RECIPE [--out DIR] [--set a.b.c=value ...] [--plan] [--resume]" in out


@pytest.mark.parametrize(
    "arguments",
    [["chat"], ["export", "a", "b"], ["x", "--nonsense"], ["x", "--set"], ["--set", "a=1"], ["-x"]],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: llava-run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "check-data", "export", "predict", "serve"])
def test_the_help_of_a_command_begins_with_it_and_hides_none_of_its_words(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: llava-run {command} ")
    assert "[hidden]" not in out


def test_a_terminal_without_a_letter_gets_it_spelt_out(
    monkeypatch: pytest.MonkeyPatch, llava_run: Command
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("llavakit_plugins.reporting.plan.render", lambda plan: "1 – 2")
    assert llava_run("llava7b", "--plan").code == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"1 \\u2013 2\n"


def test_options_may_stand_before_the_recipe(llava_run: Command) -> None:
    assert llava_run("--plan", "llava7b").out == llava_run("llava7b", "--plan").out
    assert llava_run("run", "llava7b", "--plan").code == 0


def test_recipes_are_listed_with_what_they_are(llava_run: Command) -> None:
    code, out, _ = llava_run("recipes")
    assert code == 0
    said = {name: text.strip() for name, _, text in (x.partition(" ") for x in out.splitlines())}
    assert {"tiny", "llava7b", "llava13b"} <= set(said)
    assert said["llava13b"].startswith("LLaVA 13B as in the paper")
    places = {line.index(said[line.split()[0]]) for line in out.splitlines()}
    assert len(places) == 1, "the descriptions stand in one column"


def test_an_unknown_recipe_is_exit_code_2(refused: Callable[..., str]) -> None:
    assert refused("lava13b") == "no built-in recipe is called `lava13b`; did you mean `llava13b`?"
    assert "cannot read recipe none.toml: No such file" in refused("none.toml")


def test_chat_with_one_prompt_prints_only_the_answer(
    model: Path, picture: Path, llava_run: Command
) -> None:
    arguments = ["--image", picture, "--prompt", "what colour is it ?", "--max-new-tokens", 5]
    code, out, err = llava_run("chat", model, *arguments, "--device", "cpu")
    loaded = llavakit.load(model, device="cpu")
    expected = loaded.generate("what colour is it ?", images=[picture], max_new_tokens=5)
    assert code == 0
    assert out == f"{expected}\n"
    assert err == ""


def test_sampling_depends_on_its_seed(model: Path, llava_run: Command) -> None:
    arguments = ["chat", model, "--prompt", "what ?", "--temperature", 5.0, "--max-new-tokens", 12]
    first, again, other = (llava_run(*arguments, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_chat_asks_again_until_the_input_ends(
    model: Path, picture: Path, llava_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("what colour is it ?\n\nwhat shape ?\n"))
    code, out, _ = llava_run("chat", model, "--image", picture, "--max-new-tokens", 5)
    loaded = llavakit.load(model, device="cpu")
    first = loaded.generate("what colour is it ?", images=[picture], max_new_tokens=5)
    dialogue = [
        {"role": "user", "content": "<image>\nwhat colour is it ?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "what shape ?"},
    ]
    second = loaded.generate(dialogue, [picture], max_new_tokens=5)
    assert code == 0
    assert [line.strip() for line in out.split(">")[1:]] == [first, "", second, ""]


def test_a_question_that_cannot_be_asked_does_not_end_the_chat(
    model: Path, llava_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("<image> what ?\nwhat shape ?\n"))
    code, out, err = llava_run("chat", model, "--max-new-tokens", 5)
    answer = llavakit.load(model, device="cpu").generate("what shape ?", max_new_tokens=5)
    assert code == 0
    assert "0 images for 1 `<image>` placeholder" in err
    assert answer in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "none.png", "--prompt", "x"], "image none.png of the prompt does not exist"),
        (["--image", __file__, "--prompt", "x"], "is not an image Pillow can read"),
        (["--prompt", "<image> x"], "sample `prompt` has 0 images for 1 `<image>` placeholder"),
        (["--prompt", "red " * 400], "the language model reads at most 256: shorten it"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0; use 1 to"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0; use 0 to"),
        (["--prompt", "x", "--top-p", "0"], "top_p=0.0; use 1e-09 to 1"),
        (["--prompt", "x", "--device", "cuda:77"], "device `cuda:77` is not available"),
        (["--prompt", "x", "--set", "layer=-1"], "--set layer=-1: write it as part.option=value"),
        (["--prompt", "x", "--set", "tongue.layer=-1"], "a model has no part `tongue`"),
        (["--prompt", "x", "--set", "vision.laier=-1"], "`laier` of `clip`; did you mean `layer`?"),
        (["--prompt", "x", "--set", "vision.layer=99"], "`layer = 99` names none"),
    ],
)
def test_what_chat_cannot_do_is_said(
    model: Path, refused: Callable[..., str], arguments: list[str], sentence: str
) -> None:
    assert sentence in refused("chat", model, *arguments)


def test_chat_with_other_options_of_a_part(model: Path, llava_run: Command) -> None:
    whole = llavakit.load(model, device="cpu")
    other = llavakit.load(model, device="cpu", options={"vision": {"layer": -1}})
    assert other.vision.depth == whole.vision.depth + 1
    words = "what colour is it ? " * 9
    code, _, err = llava_run("chat", model, "--prompt", words, "--set", "language.max_length=20")
    assert code == 2
    assert "the language model reads at most 20" in err


def test_chat_with_a_folder_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist; give the folder" in refused("chat", tmp_path / "none", "--prompt", "x")
    assert "holds no model that is recognised" in refused("chat", tmp_path, "--prompt", "x")


def test_chat_with_a_run_names_the_model_in_it(
    model: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(model)
    text = refused("chat", tmp_path / "run", "--prompt", "x")
    assert f"did you mean {tmp_path / 'run' / 'model'}?" in text


def test_import_replaces_nothing(model: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "is there already; name a new folder" in refused("import", model, tmp_path / "mine")
    assert "is the source, which is read and must stay as it is" in refused("import", model, model)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_export_in_an_unknown_format_names_those_there_are(
    model: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    text = refused("export", model, tmp_path / "out", "--format", "onyx")
    assert "no Exporter is called `onyx`" in text
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_a_run_that_has_not_begun_whatever_catches_it() -> None:
    """As the import of a library may."""
    code = """
import os, signal, sys, time
from llavakit.registry import Registry

def installed():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except BaseException:
        raise ImportError("could not import") from None

Registry.installed = installed
sys.argv = ["llava-run", "tiny", "--plan"]
from llavakit.cli import main
main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (130, "interrupted\n")


def test_ctrl_c_is_exit_code_130(llava_run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llavakit, "load", interrupt)
    code, _, err = llava_run("chat", "x", "--prompt", "x")
    assert code == 130
    assert err == "interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(llavakit, "load", fail)
    with pytest.raises(ZeroDivisionError):  # Python itself then exits with 1
        main(["chat", "x", "--prompt", "x"])


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m llavakit.cli recipes | head -n 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
