"""Steps that are done, changed, interrupted or failed; and what a run folder holds."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest
from tests.conftest import Command, RecipeWriter

import llavakit
from llavakit import ModelRecipe, Outcome, Recipe, Registry, Run, Step, hookimpl
from llavakit.engine.runner import run as run_recipe
from llavakit.engine.step_folders import record_of
from llavakit.recipe import files
from llavakit.recipe.recipe import StepUse


@pytest.fixture
def done(write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path) -> tuple[Path, Path]:
    """A recipe and the folder of its finished run."""
    path = write_recipe()
    assert llava_run(path, "--out", tmp_path / "run").code == 0
    return path, tmp_path / "run"


def stamps(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_a_run_folder_holds_what_the_run_was(done: tuple[Path, Path]) -> None:
    path, run = done
    registry = Registry.installed()
    recipe = Recipe.load(path, registry)
    assert Recipe.load(run / "recipe.toml", registry) == recipe

    plan = json.loads((run / "plan.json").read_text())
    assert set(plan["parts"]) == {"vision", "connector", "language"}
    assert list(plan["steps"]) == ["01-pretrain", "02-finetune"]
    assert plan["steps"]["02-finetune"]["steps"] == 6
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["llavakit"]
    assert environment["device"] == "cpu"

    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert all({"time", "step", "event"} <= set(event) for event in events)
    trained = [event for event in events if event["event"] == "train"]
    assert [(event["step"], event["at"]) for event in trained] == [
        *(("01-pretrain", at) for at in (1, 2, 3)),
        *(("02-finetune", at) for at in (1, 2, 3, 4, 5, 6)),
    ]
    for event in trained:
        assert event["loss"] > 0
        assert event["grad_norm"] > 0
    html = (run / "report.html").read_text()
    assert "Training loss" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "02-finetune" in (run / "report.md").read_text()
    assert (run / "model").is_symlink()
    assert not os.path.isabs(os.readlink(run / "model"))
    assert (
        llavakit.load(run / "model", device="cpu").generate("what ?", max_new_tokens=2) is not None
    )


def test_steps_that_are_done_are_skipped(done: tuple[Path, Path], llava_run: Command) -> None:
    path, run = done
    folders = [run / "01-pretrain", run / "02-finetune"]
    before = [stamps(folder) for folder in folders]
    code, out, err = llava_run(path, "--out", run)
    assert code == 0
    assert "01-pretrain: done before" in err
    assert "02-finetune: done before" in err
    assert "report.html" in out
    assert [stamps(folder) for folder in folders] == before


def test_a_changed_recipe_goes_on_from_the_first_changed_step(
    done: tuple[Path, Path], llava_run: Command
) -> None:
    path, run = done
    before = stamps(run / "01-pretrain")
    old = (run / "02-finetune" / "model" / "connector.safetensors").read_bytes()
    code, _, err = llava_run(path, "--out", run, "--set", "steps.finetune.epochs=1")
    assert code == 0
    assert "01-pretrain: done before" in err
    assert "02-finetune: the recipe changed (steps.finetune.epochs), so it is done again" in err
    assert stamps(run / "01-pretrain") == before
    aside = run / "superseded" / "02-finetune.1"
    assert str(aside) in err
    assert (aside / "model" / "connector.safetensors").read_bytes() == old
    assert (run / "02-finetune" / "model" / "connector.safetensors").read_bytes() != old

    code, _, err = llava_run(path, "--out", run, "--set", "seed=1")
    assert "01-pretrain: the recipe changed" in err
    assert "02-finetune: the recipe changed" in err
    assert (run / "superseded" / "02-finetune.2").is_dir()


def test_a_folder_that_was_only_just_made_is_taken(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    """As a kill or a full disk leaves it, before it is noted what the step was made of."""
    run = tmp_path / "run"
    (run / "01-pretrain").mkdir(parents=True)
    code, _, err = llava_run(write_recipe(), "--out", run, "--set", "steps.2.skip=true")
    assert code == 0, err
    assert "changed" not in err
    assert not (run / "superseded").exists()


def test_what_does_not_change_a_step_does_not_redo_it(
    done: tuple[Path, Path], llava_run: Command
) -> None:
    path, run = done
    code, _, err = llava_run(
        path, "--out", run, "--set", "machine.usd_per_hour=3", "--set", "name=x"
    )
    assert code == 0
    assert err.count("done before") == 2


def test_training_from_a_folder_needs_no_model_in_the_recipe(
    done: tuple[Path, Path], llava_run: Command, tmp_path: Path, data: Path
) -> None:
    path = tmp_path / "more.toml"
    own = f'{{ use = "conversations", path = "{data}/train.json", images = "{data}/images" }}'
    path.write_text(
        f'[[steps]]\nuse = "finetune"\ninit = "{done[1]}/model"\ntrain = {{ connector = 1e-3 }}\n'
        f"max_steps = 1\nbatch_size = 2\nmax_length = 64\ndata = {own}\n"
    )
    code, out, err = llava_run(path, "--plan")
    assert code == 0, err
    assert "finetune: vision, language frozen" in out
    assert "?" not in out
    code, _, err = llava_run(path, "--out", tmp_path / "run")
    assert code == 0, err
    assert (tmp_path / "run" / "model" / "model.toml").is_file()


def test_a_skipped_step_leaves_no_folder_and_keeps_the_numbers(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    path = write_recipe()
    assert llava_run(path, "--out", tmp_path / "run", "--set", "steps.1.skip=true").code == 0
    assert not (tmp_path / "run" / "01-pretrain").exists()
    assert (tmp_path / "run" / "02-finetune" / "model").is_dir()


def test_a_run_can_be_moved(done: tuple[Path, Path], llava_run: Command, tmp_path: Path) -> None:
    path, run = done
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(run, moved)
    assert llavakit.load(moved / "model", device="cpu").generate_ids("what ?", max_new_tokens=1)
    assert llava_run(path, "--out", moved).err.count("done before") == 2


def test_an_interrupted_step_starts_over_without_resume_and_the_attempt_is_kept(
    done: tuple[Path, Path], llava_run: Command
) -> None:
    path, run = done
    expected = (run / "02-finetune" / "model" / "connector.safetensors").read_bytes()
    (run / "02-finetune" / "artifact.json").unlink()  # written last: it was not finished
    code, _, err = llava_run(path, "--out", run)
    assert code == 0
    assert "02-finetune: starts over; the interrupted attempt is in" in err
    assert "(--resume goes on)" in err
    assert (run / "superseded" / "02-finetune.1" / "checkpoints").is_dir()
    assert (run / "02-finetune" / "model" / "connector.safetensors").read_bytes() == expected


def test_two_runs_in_one_folder_are_refused(
    done: tuple[Path, Path], refused: Callable[..., str]
) -> None:
    import fcntl  # by the system's own call: any process that holds the file counts

    path, run = done
    with (run / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another llava-run is writing to" in refused(path, "--out", run)


def test_what_a_killed_run_leaves_for_a_moment_is_waited_for(
    done: tuple[Path, Path], llava_run: Command
) -> None:
    """Its forks have its lock, and end when they see that it has."""
    import fcntl

    path, run = done
    with (run / ".lock").open("w") as left:
        fcntl.flock(left, fcntl.LOCK_EX)
        leaving = Timer(0.5, fcntl.flock, (left, fcntl.LOCK_UN))
        leaving.start()
        assert llava_run(path, "--out", run).code == 0
        leaving.join()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\udcff", "[" * 9999, '{"record": 1}'])
def test_a_damaged_record_is_named(
    done: tuple[Path, Path], refused: Callable[..., str], text: str
) -> None:
    path, run = done
    (run / "01-pretrain" / "artifact.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    sentence = refused(path, "--out", run)
    assert "01-pretrain/artifact.json is damaged" in sentence
    assert "move its folder away" in sentence


def test_nothing_of_the_users_is_deleted(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    for name in ("model", "01-pretrain"):
        (out / name).mkdir(parents=True)
        (out / name / "precious.txt").write_text(name)
    assert llava_run(write_recipe(), "--out", out).code == 0
    kept = {file.read_text() for file in out.rglob("precious.txt")}
    assert kept == {"model", "01-pretrain"}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    path = write_recipe()
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        assert llava_run(path, "--out", out, "--set", f"seed={seed}").code == 0
        found.append((out / "model" / "connector.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


TRACKER = """\
from llavakit import Tracker, hookimpl
SEEN = []

class Watch(Tracker):
    name = "watch"
    def __init__(self, options):
        pass
    def record(self, event):
        SEEN.append(event)
    def close(self):
        SEEN.append("closed")

@hookimpl
def llava_trackers():
    return [Watch]
"""


def test_a_tracker_sees_events_only_where_the_recipe_names_it(
    write_recipe: RecipeWriter,
    llava_run: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib

    from tests.core.registry.test_registry import distribution

    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    distribution(site, "llava-watch", "llava_watch", TRACKER)
    seen = importlib.import_module("llava_watch").SEEN
    path = write_recipe()
    assert llava_run(path, "--out", tmp_path / "a", "--set", "steps.2.skip=true").code == 0
    assert seen == []
    path.write_text('trackers = [{ use = "watch" }]\n' + path.read_text())
    assert llava_run(path, "--out", tmp_path / "b", "--set", "steps.2.skip=true").code == 0
    assert seen[0]["event"] == "run"
    assert seen[-2]["event"] == "done"
    assert seen[-1] == "closed"
    lines = (tmp_path / "b" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == seen[:-1]
    assert tomllib.loads((tmp_path / "b" / "recipe.toml").read_text())["trackers"] == [
        {"use": "watch"}
    ]


EVALUATE = """\

[[steps]]
use = "evaluate"
blind = true
max_new_tokens = 3
benchmarks = [
  { use = "exact-match", data = { DATA } },
  { use = "exact-match", limit = 5, data = { DATA } },
]
losses = [{ DATA }, { DATA, kind = "same" }, { DATA, kind = "same" }]

[[steps]]
use = "export"
count = 2
tries = { DATA }
"""


def test_a_model_is_evaluated_exported_and_tried(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, data: Path
) -> None:
    path = write_recipe()
    own = f'use = "conversations", path = "{data}/train.json", images = "{data}/images"'
    path.write_text(path.read_text() + EVALUATE.replace("DATA", own))
    run = tmp_path / "run"
    code, _, err = llava_run(path, "--out", run, "--set", "steps.1.skip=true")
    assert code == 0, err
    metrics = json.loads((run / "03-evaluate" / "artifact.json").read_text())["metrics"]
    assert {
        "exact-match_sighted_accuracy",
        "exact-match_blind_accuracy",
        "exact-match-2_sighted_accuracy",
        "loss_conversations",
        "loss_same",
        "loss_same-2",
    } <= set(metrics)
    assert metrics["loss_same"] == metrics["loss_same-2"] == metrics["loss_conversations"]

    def lines(name: str) -> list[dict[str, object]]:
        text = (run / "03-evaluate" / f"{name}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    assert len(lines("exact-match")) == 24 + 8  # every question of every conversation
    assert len(lines("exact-match-2")) == 5
    for sighted, blind in zip(lines("exact-match"), lines("exact-match-blind"), strict=True):
        assert sighted["question_id"] == blind["question_id"]
        if sighted["image"]:
            assert sighted["image"] != blind["image"]
        else:
            assert blind["image"] == []
    trained, exported = run / "02-finetune" / "model", run / "04-export" / "model"
    for file in ("connector.safetensors", "language/model.safetensors"):
        assert (trained / file).read_bytes() == (exported / file).read_bytes()
    assert (run / "model").resolve() == exported


def test_changed_data_are_a_changed_recipe(
    done: tuple[Path, Path], llava_run: Command, tmp_path: Path
) -> None:
    path, run = done
    data = tmp_path / "pretrain.json"
    data.write_text(json.dumps(json.loads(data.read_text())[:-1]))
    ended = llava_run(path, "--out", run)
    assert ended.code == 0
    assert "01-pretrain: its data changed" in ended.err
    assert json.loads((run / "01-pretrain" / "artifact.json").read_text())["metrics"]["steps"] == 3


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "inner/large.bin"])
def test_another_model_in_a_folder_s_place_is_a_changed_recipe(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "HASHED_BYTES", 4000)
    for folder in ("start", "clip"):
        (tmp_path / folder / "inner").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "a.png"):
            (tmp_path / folder / name).write_bytes(b"{}")
        (tmp_path / folder / "inner" / "large.bin").write_bytes(bytes(5000))
    part = {"use": "clip", "source": "clip"}
    model = {"vision": part, "connector": {"use": "linear"}, "language": {"use": "vicuna"}}
    steps = [{"use": "pretrain"}, {"use": "finetune", "init": "start", "data": {"path": ""}}]
    recipe = Recipe.model_construct(
        seed=0,
        model=ModelRecipe.model_validate(model),
        steps=tuple(StepUse.model_validate(step) for step in steps),
    )
    records = [record_of(recipe, name) for name in ("01-pretrain", "02-finetune")]
    assert len(records[0]["files"]) == 3  # of clip's; no image
    assert len(records[1]["files"]) == 6
    (tmp_path / "clip" / "a.png").write_bytes(b"another")
    assert record_of(recipe, "01-pretrain") == records[0]
    written = bytearray((tmp_path / "start" / changed).read_bytes())
    written[len(written) // 2] ^= 1  # of the same size
    (tmp_path / "start" / changed).write_bytes(written)
    assert record_of(recipe, "01-pretrain") == records[0]
    assert record_of(recipe, "02-finetune") != records[1]
    (tmp_path / "clip" / changed).write_bytes(written)
    assert record_of(recipe, "01-pretrain") != records[0]


@pytest.mark.parametrize("name", ["recipe.toml", "report.html"])
def test_no_run_writes_over_what_no_run_wrote(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, name: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / name).write_text("mine")
    ended = llava_run(write_recipe(), "--out", own)
    assert ended.code == 2
    assert f"{own / name} is no run's" in ended.err
    assert [path.name for path in own.iterdir()] == [name]
    assert (own / name).read_text() == "mine"


def test_an_empty_folder_name_is_no_folder(
    write_recipe: RecipeWriter, llava_run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        llava_run(write_recipe(), "--out", "")
    assert ended.value.code == 2
    assert "its name is empty" in capsys.readouterr().err


class AskingForADevice(Step):
    """Needs no model, but asks for a device all the same."""

    name = "asking"

    def __init__(self, options: object) -> None:
        pass

    def run(self, run: Run) -> Outcome:
        (run.directory / "device.txt").write_text(str(run.device))
        return Outcome({})


@pytest.mark.parametrize(("device", "known"), [("cpu", "cpu"), ("cuda:77", None)])
def test_a_device_is_found_when_a_step_first_asks(
    tmp_path: Path, device: str, known: str | None
) -> None:
    class Plugin:
        @hookimpl
        def llava_steps(self) -> list[type[Step]]:
            return [AskingForADevice]

    registry = Registry.installed()
    registry.register(Plugin())
    path = tmp_path / "recipe.toml"
    path.write_text(f'device = "{device}"\n[[steps]]\nuse = "asking"\n')
    recipe = Recipe.load(path, registry)
    if known is None:
        with pytest.raises(llavakit.ModelError, match=f"device `{device}` is not available"):
            run_recipe(recipe, registry, tmp_path / "run")
        return
    run_recipe(recipe, registry, tmp_path / "run")
    assert (tmp_path / "run" / "01-asking" / "device.txt").read_text() == known
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert facts["device"] == facts["device_name"] == known
    assert facts["threads"] >= 1


def test_a_device_that_is_not_there_is_said_before_anything_is_done(
    write_recipe: RecipeWriter, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = write_recipe(('device = "cpu"', 'device = "cuda:77"'))
    assert "device `cuda:77` is not available" in refused(path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_who_stops_a_run_is_told_the_whole_command_to_go_on_with(
    tmp_path: Path, llava_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without its `--set` would be another one, and its folder be set aside."""
    path = tmp_path / "recipe.toml"
    contexts = tmp_path / "contexts.jsonl"
    contexts.write_text(
        '{"id": "1", "image": "1.jpg", "captions": ["A cat."], '
        '"instances": [{"category": "cat", "bbox": [0, 0, 1, 1]}]}\n'
    )
    path.write_text(
        f'[[steps]]\nuse = "generate"\ncontexts = "{contexts}"\ngenerator = {{ use = "offline" }}\n'
    )
    out = tmp_path / "a run"
    arguments = [path, "--out", out, "--set", 'steps.generate.kinds=["detail"]', "--set", "seed=3"]

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr("llavakit_plugins.steps.generate.caption_row", interrupt)
        code, _, err = llava_run(*arguments)
    assert code == 130
    command = shlex.split(err.partition("Go on with: ")[2])
    assert command == ["llava-run", *map(str, arguments), "--resume"]
    assert llava_run(*command[1:]).code == 0
    assert not (out / "superseded").exists()
