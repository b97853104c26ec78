"""A run that is killed, interrupted or fails goes on to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Command, RecipeWriter
from tests.core import processes


def weights(run: Path) -> dict[str, bytes]:
    """Return every weight file of the models that the steps left."""
    files = (file for file in run.glob("0*/model/**/*.safetensors"))
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


def events(run: Path) -> list[dict[str, object]]:
    text = (run / "events.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def leftovers(run: Path) -> list[str]:
    found = (path.relative_to(run).as_posix() for path in run.rglob(".*") if path.name != ".lock")
    return [path for path in found if not path.startswith("superseded/")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def recipe(
    write_recipe: RecipeWriter, whole: Path, tmp_path: Path
) -> tuple[Path, dict[str, bytes]]:
    """A recipe, and the weights that an uninterrupted run of it makes (in its own process)."""
    path = whole / "small.toml"
    if not path.exists():
        text = write_recipe().read_text()
        pretrain = tmp_path / "pretrain.json"
        shutil.copy(pretrain, whole / "pretrain.json")
        path.write_text(text.replace(str(pretrain), str(whole / "pretrain.json")))
        assert processes.run(whole, path, "--out", whole / "run") == 0
    return path, weights(whole / "run")


# numbers of a run's writes: its facts, the first step's checkpoints and model, the second's
@pytest.mark.parametrize("number", [12, 25, 37, 52, 66, 78, 90])
def test_killed_before_any_write_it_resumes_to_the_same_bytes(
    recipe: tuple[Path, dict[str, bytes]], tmp_path: Path, number: int
) -> None:
    path, expected = recipe
    out = tmp_path / "run"
    assert processes.run(tmp_path, path, "--out", out, kill_at=number) == -signal.SIGKILL
    assert processes.run(tmp_path, path, "--out", out, "--resume") == 0
    assert weights(out) == expected
    assert leftovers(out) == []
    assert events(out)[-1]["event"] == "done"
    assert (out / "model").resolve() == out / "02-finetune" / "model"


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.parametrize("count", [4, 9])
def test_killed_while_it_trains_it_resumes_to_the_same_bytes(
    recipe: tuple[Path, dict[str, bytes]], tmp_path: Path, count: int
) -> None:
    path, expected = recipe
    out = tmp_path / "run"
    process = processes.start(tmp_path, path, "--out", out)
    wait_for(lambda: lines(out / "events.jsonl") >= count)
    process.kill()
    assert processes.finish(process) == -signal.SIGKILL
    assert processes.run(tmp_path, path, "--out", out, "--resume") == 0
    assert weights(out) == expected


def test_killed_again_and_again_it_arrives_at_the_same_bytes(
    recipe: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    path, expected = recipe
    out = tmp_path / "run"
    codes = []
    for number in (35, 29, 33, 47):
        codes.append(processes.run(tmp_path, path, "--out", out, "--resume", kill_at=number))
    assert codes.count(-signal.SIGKILL) >= 3
    assert processes.run(tmp_path, path, "--out", out, "--resume") == 0
    assert weights(out) == expected


def test_an_interrupt_saves_and_says_how_to_go_on(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    changes = [("epochs = 2", "epochs = 12"), ("checkpoint_every = 2", "checkpoint_every = 1000")]
    path = write_recipe(*changes)
    out = tmp_path / "run"
    process = processes.start(tmp_path, path, "--out", out)
    wait_for(lambda: lines(out / "events.jsonl") >= 8)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert processes.finish(process) == 130
    said = (tmp_path / "terminal.txt").read_text()
    assert f"--out {out} --resume" in said
    assert "Traceback" not in said
    assert list((out / "02-finetune" / "checkpoints").glob("step-*"))
    assert processes.run(tmp_path, path, "--out", out, "--resume") == 0
    assert any(event["event"] == "resumed" for event in events(out))
    assert processes.run(tmp_path, path, "--out", tmp_path / "again") == 0
    assert weights(out) == weights(tmp_path / "again")


def test_the_last_checkpoints_are_kept(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    path = write_recipe(("epochs = 2", "epochs = 3\nkeep = 2"))
    assert llava_run(path, "--out", tmp_path / "run").code == 0
    kept = sorted((tmp_path / "run" / "02-finetune" / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["step-000008", "step-000009"]


@pytest.fixture
def stopped(recipe: tuple[Path, dict[str, bytes]], whole: Path, tmp_path: Path) -> Path:
    """A run whose second step stopped after its last checkpoint."""
    shutil.copytree(whole / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "02-finetune" / "artifact.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", lambda data: data[:-40]),
        ("state.safetensors", lambda data: b""),
        ("state.safetensors", lambda data: b"\xff" * 64 + data[64:]),
        ("state.json", lambda data: data[: len(data) // 2]),
        ("state.json", lambda data: b"{}"),
        ("state.json", lambda data: b"[]"),
        ("state.json", lambda data: b"[" * 9999),
        ("state.json", lambda data: data.replace(b'"tokens": ', b'"tokens": 1')),
        ("state.json", lambda data: data.replace(b'"epoch": ', b'"epoch": "x", "y": ')),
        ("state.json", None),
        ("state.safetensors", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
    ],
)
def test_a_damaged_checkpoint_is_named(
    recipe: tuple[Path, dict[str, bytes]],
    stopped: Path,
    refused: Callable[..., str],
    file: str,
    damage: Callable[[bytes], bytes] | None,
) -> None:
    place = stopped / "02-finetune" / "checkpoints" / "step-000006" / file
    if damage is None:
        place.unlink()
    else:
        place.write_bytes(damage(place.read_bytes()))
    text = refused(recipe[0], "--out", stopped, "--resume")
    assert f"checkpoint {place.parent} is damaged" in text
    assert "remove it to go on" in text
    shutil.rmtree(place.parent)
    assert processes.run(stopped.parent, recipe[0], "--out", stopped, "--resume") == 0
    assert weights(stopped) == recipe[1]


def test_copies_beside_checkpoints_are_left_alone(
    recipe: tuple[Path, dict[str, bytes]], stopped: Path
) -> None:
    folder = stopped / "02-finetune" / "checkpoints"
    names = [
        "step-000006-bak",
        "step-000006 (copy)",
        "step-x",
        "step-",
        "best-000006-bak",
        "step-٣",
    ]
    for name in names:
        shutil.copytree(folder / "step-000006", folder / name)
    (folder / "step-000099").write_text("a file")
    (stopped / "02-finetune" / "artifact.json").unlink(missing_ok=True)
    assert processes.run(stopped.parent, recipe[0], "--out", stopped, "--resume") == 0
    assert weights(stopped) == recipe[1]
    assert all((folder / name / "state.json").is_file() for name in names)


def test_a_copy_under_another_step_s_name_is_named(
    recipe: tuple[Path, dict[str, bytes]], stopped: Path, refused: Callable[..., str]
) -> None:
    folder = stopped / "02-finetune" / "checkpoints"
    shutil.copytree(folder / "step-000006", folder / "step-000009")
    text = refused(recipe[0], "--out", stopped, "--resume")
    assert f"{folder / 'step-000009'} is damaged (it is that of step 6)" in text


def test_a_torn_last_line_of_events_is_dropped(
    recipe: tuple[Path, dict[str, bytes]], stopped: Path, llava_run: Command
) -> None:
    file = stopped / "events.jsonl"
    before = events(stopped)
    with file.open("a") as stream:
        stream.write('{"time": 17000')
    assert llava_run(recipe[0], "--out", stopped, "--resume").code == 0
    after = events(stopped)
    assert after[: len(before)] == before
    assert len(after) > len(before)
