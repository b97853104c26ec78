"""What commands print of foreign text drives no terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from tests.conftest import Command

from llavakit import Registry, Sample
from llavakit.contracts.errors import DataError
from llavakit.recipe.files import CONTROL

EVIL = "a\x1b[2J\x1b]0;title\x07\x9b31m\u202eb"
SHOWN = "a\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\u202eb"


def texts_in(node: Any) -> set[str]:
    """Return every key and text of JSON; of a metric's the name behind its step, too."""
    if isinstance(node, dict | list):
        items = [*node, *node.values()] if isinstance(node, dict) else node
        return set().union(*map(texts_in, items))
    return {str(node), str(node).removeprefix("evaluate.")}


class Talking:
    """A model that says what it must not."""

    def generate(self, *_: object, **__: object) -> str:
        return EVIL

    def stream(self, asked: Sample, **_: object) -> Iterator[str]:
        if asked.turns[-1].text == "fail":
            raise DataError(f"image {EVIL} is missing")
        yield from EVIL


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch) -> None:
    from llavakit_plugins.commands import chat

    monkeypatch.setattr(chat, "load_model", lambda *_: Talking())


@pytest.mark.usefixtures("talking")
def test_answers(llava_run: Command) -> None:
    code, out, _ = llava_run("chat", "m", "--prompt", "what ?")
    assert (code, out) == (0, SHOWN + "\n")


@pytest.mark.usefixtures("talking")
def test_answers_as_they_come_and_errors(
    llava_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what ?\nfail\n"))
    code, out, err = llava_run("chat", "m")
    assert code == 0
    assert SHOWN in out
    assert SHOWN in err
    assert not CONTROL.search(out + err)


def test_a_line_end_of_foreign_text_begins_no_line(llava_run: Command, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    row = {"id": "a\nerror: run this", "image": "gone.png", "conversations": turns}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    code, out, err = llava_run("check-data", tmp_path / "rows.json", "--images", tmp_path)
    assert code == 2
    assert "a\\nerror: run this" in out
    row["conversations"] = []
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    code, _, err = llava_run("predict", "m", tmp_path / "rows.json", tmp_path / "out.jsonl")
    assert code == 2
    assert err.count("\n") == 1


def test_warnings_are_lines_and_tracebacks_stay_tracebacks() -> None:
    script = """
import logging, llavakit.cli
try:
    llavakit.cli.main(["--version"])
except SystemExit:
    pass
log = logging.getLogger("llavakit")
log.warning("image `a\\nerror: b` is broken")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it ended")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert lines[0] == r"image `a\nerror: b` is broken"
    assert lines[1:3] == ["it ended", "Traceback (most recent call last):"]


def test_export_and_import(
    llava_run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = SimpleNamespace(merged=lambda: None)
    monkeypatch.setattr("llavakit_plugins.commands.flags.load_model", lambda *_: model)
    monkeypatch.setattr("llavakit.LlavaModel", SimpleNamespace)
    exporter = SimpleNamespace(export=lambda *_: {EVIL: EVIL})
    monkeypatch.setattr("llavakit_plugins.commands.options.build_from", lambda *_: exporter)
    code, out, err = llava_run("export", "m", tmp_path / "x", "--format", "hf")
    assert (code, out) == (0, f"{SHOWN}: {SHOWN}\n"), err


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "r.toml", EVIL),
        ("chat", "m", "--temperature", EVIL),
        ("check-data", "f", f"--{EVIL}"),
        ("compare", "r", f"--{EVIL}"),
        ("score", "scienceqa", "--problems", "p", "--predictions", "q", f"--{EVIL}"),
        ("export", "m", "o", "--format", "hf", EVIL),
        ("import", "m", "o", EVIL),
        ("recipes", EVIL),
    ],
)
def test_arguments_that_a_command_does_not_take(
    llava_run: Command, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        llava_run(*arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert "x1b[2J" in err
    assert not CONTROL.search(err)


@pytest.mark.parametrize(
    "arguments",
    [
        (EVIL,),
        ("recipes.toml", "--set", f"{EVIL}=1"),
        ("tiny", "--plan", "--set", f"{EVIL}=1"),
        ("tiny", "--plan", "--set", f"seed={EVIL}"),
        ("import", EVIL, "o"),
        ("export", EVIL, "o", "--format", "hf"),
        ("export", "m", "o", "--format", EVIL),
        ("check-data", EVIL),
        ("score", EVIL),
        ("plugins", EVIL),
        ("chat", EVIL, "--prompt", "what ?"),
        ("compare", EVIL),
    ],
)
def test_names_that_nothing_has(llava_run: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = llava_run(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert not CONTROL.search(out + err)


@pytest.mark.parametrize("name", ["n" * 300, "/".join(["d" * 200] * 30)])
@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "NAME"),
        ("chat", "m", "--image", "NAME"),
        ("check-data", "NAME"),
        ("check-data", "f", "--images", "NAME"),
        ("compare", "NAME"),
        ("compare", "r", "--csv", "NAME"),
        ("export", "NAME", "o", "--format", "hf"),
        ("import", "m", "NAME"),
        ("tiny", "--out", "NAME"),
        ("NAME", "--plan"),
    ],
)
def test_names_that_no_file_can_have(
    llava_run: Command, arguments: tuple[str, ...], name: str
) -> None:
    code, _, err = llava_run(*(word.replace("NAME", name) for word in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert len(err) < 3000


@pytest.mark.parametrize(
    "setting",
    ["device=\udcff", "\udcff=1", "steps.1.use=\udcff", "model.vision.config={a='\udcff'}"],
)
def test_bytes_that_are_no_text(llava_run: Command, setting: str) -> None:
    """As a shell hands them on, of a name in another encoding, say."""
    code, _, err = llava_run("tiny", "--plan", "--set", setting)
    assert code == 2
    assert "is no text in UTF-8" in err


def test_a_written_folder(
    llava_run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = SimpleNamespace()
    monkeypatch.setattr("llavakit_plugins.commands.flags.load_model", lambda *_: loaded)
    monkeypatch.setattr("llavakit.LlavaModel", SimpleNamespace)
    monkeypatch.setattr("llavakit.save_model", lambda *_: None)
    code, out, err = llava_run("import", "m", tmp_path / EVIL)
    assert (code, out) == (0, f"wrote {tmp_path}/{SHOWN}\n"), err


def test_listed_recipes(
    llava_run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / f"{EVIL}.toml").write_text(f"# {EVIL}\nname = 'x'\n")
    monkeypatch.setattr("llavakit.recipe.recipe.recipe_folder", lambda: tmp_path)
    code, out, err = llava_run("recipes")
    assert code == 0, err
    assert out.count(SHOWN) == 2
    assert not CONTROL.search(out + err)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_compared_runs(llava_run: Command, tmp_path: Path, more: list[str]) -> None:
    for seed in (0, 1):
        step = tmp_path / str(seed) / "01-evaluate"
        step.mkdir(parents=True)
        recipe = {"name": EVIL, "seed": seed, "steps": [{"use": "evaluate"}]}
        (step.parent / "recipe.toml").write_text(tomli_w.dumps(recipe))
        (step / "artifact.json").write_text(json.dumps({"metrics": {EVIL: 0.5, "\x7f": 1.0}}))
    torn = tmp_path / "torn\x1b[2J"
    torn.mkdir()
    code, out, err = llava_run("compare", tmp_path / "0", tmp_path / "1", torn, *more)
    assert code == 0, err
    assert not CONTROL.search(out + err)
    assert "title" in out
    if more:
        assert EVIL in texts_in(json.loads(out))


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_scores(
    llava_run: Command, monkeypatch: pytest.MonkeyPatch, more: list[str], tmp_path: Path
) -> None:
    from llavakit.contracts.sections import Table
    from llavakit_plugins.commands import scoring

    result = SimpleNamespace(
        notes=[EVIL], data={EVIL: "\x7f"}, tables=[Table(title=EVIL, columns=[EVIL], rows=[[EVIL]])]
    )
    scored = SimpleNamespace(score=lambda: result)
    monkeypatch.setattr("llavakit_plugins.commands.options.build_from", lambda *_: scored)
    name, scorer = next(iter(scoring.find_scorers(Registry.installed()).items()))
    stated: list[Any] = []
    for option, field in scorer.Options.model_fields.items():
        if field.is_required():
            flag = [] if option in scorer.positional else [f"--{option.replace('_', '-')}"]
            stated += [*flag, tmp_path / "x"]
    code, out, err = llava_run("score", name, *stated, *more)
    assert code == 0, err
    assert not CONTROL.search(out + err)
    assert "title" in out
    assert "title" in err


def test_components_of_others(llava_run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    origins: Callable[..., Any] = lambda *_: {EVIL: (EVIL, "\x7f1")}  # noqa: E731
    usable: Callable[..., Any] = lambda *_: {EVIL: None}  # noqa: E731
    monkeypatch.setattr(Registry, "origins", origins)
    monkeypatch.setattr(Registry, "all", usable)
    for more in ([], ["--json"]):
        code, out, err = llava_run("plugins", *more)
        assert code == 0, err
        assert not CONTROL.search(out + err)
        assert "title" in out
