"""Models go to the hub by its own client, over HTTP, and what arrived loads and answers the same.

The client reads its address and its mode when it is imported, so it runs in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from tests.conftest import Command, RecipeWriter
from tests.plugins.publishing.hub_server import TOKEN, HubServer, serve_hub

import llavakit

Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serve_hub() as server:
        yield server


@pytest.fixture
def llava(hub: HubServer, tmp_path: Path) -> Push:
    """A function that runs `llava-run` in a process whose hub is ours."""

    def call(
        *arguments: object, token: str | None = TOKEN, url: str = hub.url
    ) -> subprocess.CompletedProcess[str]:
        own = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        environment = {**os.environ, **own, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        environment.pop("HF_TOKEN", None)
        if token is not None:
            environment["HF_TOKEN"] = token
        return subprocess.run(
            [sys.executable, "-m", "llavakit.cli", *map(str, arguments)],
            capture_output=True, text=True, check=False, env=environment, timeout=300,
        )  # fmt: skip

    return call


EVALUATE = """\

[[steps]]
use = "evaluate"
max_new_tokens = 3
benchmarks = [{{ use = "exact-match", limit = 5, data = {{ use = "conversations", \
path = "{data}/train.json", images = "{data}/images" }} }}]
"""
PUSH = """\

[[steps]]
use = "push"
name = "lab/small"
private = true
"""


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(runs: Path, write_recipe: RecipeWriter, llava_run: Command, data: Path) -> Path:
    """The folder of a run that was trained and evaluated; made once."""
    if not (runs / "run").exists():
        path = write_recipe(("epochs = 2", "max_steps = 1"))
        path.write_text(path.read_text() + EVALUATE.format(data=data))
        done = llava_run(path, "--out", runs / "run", "--set", "steps.1.skip=true")
        assert done.code == 0, done.err
    return runs / "run"


def write(hub: HubServer, name: str, folder: Path) -> Path:
    for path, content in hub.files[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_a_model_arrives_whole_with_a_card_of_its_run(
    trained: Path, hub: HubServer, llava: Push, tmp_path: Path
) -> None:
    done = llava("push", trained / "model", "lab/small", "--private")
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/lab/small" in done.stdout
    asked = hub.repositories["lab/small"]
    assert asked.get("private") or asked.get("visibility") == "private"
    ours = llavakit.load(trained / "model", device="cpu")
    theirs = llavakit.load(write(hub, "lab/small", tmp_path / "arrived"), device="cpu")
    assert theirs.generate_ids("what ?") == ours.generate_ids("what ?")

    card: Any = ModelCard((tmp_path / "arrived" / "README.md").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "other"
    (result, *_) = card.data.eval_results
    assert (result.dataset_name, result.task_type) == ("exact-match", "image-text-to-text")
    assert 'pipeline("image-text-to-text", model="lab/small")' in card.text
    assert 'llavakit.load("lab/small")' in card.text
    assert 'use = "finetune"' in card.text
    assert "| 03-evaluate |" in card.text
    assert not list(trained.glob(".push-*")), "what was laid out is gone once it is there"


def test_no_token_is_written_anywhere(
    trained: Path, hub: HubServer, llava: Push, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = llava("push", trained / "model", "lab/small", "--staging", tmp_path / "staged")
    assert done.returncode == 0, done.stderr
    hub.refuse = 403
    refused = llava("push", trained / "model", "lab/other", "--staging", tmp_path / "staged")
    assert refused.returncode == 2
    for text in (done.stdout, done.stderr, refused.stdout, refused.stderr):
        assert TOKEN not in text
    for folder in (trained, tmp_path, out):
        for file in folder.rglob("*"):
            assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    assert not any(TOKEN.encode() in content for content in hub.files["lab/small"].values())


def test_an_upload_that_breaks_off_goes_on_where_it_was(
    trained: Path, hub: HubServer, llava: Push, tmp_path: Path
) -> None:
    arguments = ("push", trained / "model", "lab/two", "--format", "hf", "--format", "original")
    staging = ("--staging", tmp_path / "staged")
    hub.fail_after = 1
    broken = llava(*arguments, *staging)
    assert broken.returncode == 2
    assert "push again: what was sent is not sent again" in broken.stderr
    assert "Traceback" not in broken.stderr
    assert len(hub.puts) == 1
    laid_out = tmp_path / "staged" / "upload" / "config.json"
    laid_out.write_bytes(laid_out.read_bytes() + b" ")  # to be known again
    hub.fail_after = None
    done = llava(*arguments, *staging)
    assert done.returncode == 0, done.stderr
    assert len(hub.puts) == len(set(hub.puts)), "a large file was sent twice"
    assert {"config.json", "model.safetensors", "original/config.json"} <= set(hub.files["lab/two"])
    assert hub.files["lab/two"]["config.json"].endswith(b" "), "what was there was laid out anew"
    assert not (tmp_path / "staged").exists()
    arrived = write(hub, "lab/two", tmp_path / "arrived")
    ours = llavakit.load(trained / "model", device="cpu").generate_ids("what ?")
    for folder in (arrived, arrived / "original"):
        assert llavakit.load(folder, device="cpu").generate_ids("what ?") == ours


def test_without_a_connection_it_says_how_to_go_on(
    trained: Path, llava: Push, tmp_path: Path
) -> None:
    nowhere = ("--staging", tmp_path / "staged")
    done = llava("push", trained / "model", "lab/x", "--as-is", *nowhere, url="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "lab/x could not be sent" in done.stderr
    assert "push again" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_model_in_its_place_is_laid_out_anew(
    trained: Path, hub: HubServer, llava: Push, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    hub.refuse = 403
    assert llava("push", folder, "lab/next", "--as-is").returncode == 2
    assert (tmp_path / ".push-lab--next" / "upload" / "model.toml").is_file()
    (tmp_path / ".push-lab--next" / ".upload.partial").mkdir()  # as a kill leaves it
    (tmp_path / ".push-lab--next" / ".upload.old").mkdir()
    changed = (folder / "model.toml").read_text() + "# trained again\n"
    (folder / "model.toml").write_text(changed)
    hub.refuse = None
    assert llava("push", folder, "lab/next", "--as-is").returncode == 0
    assert hub.files["lab/next"]["model.toml"].decode() == changed
    assert not (tmp_path / ".push-lab--next").exists()


@pytest.mark.parametrize("how", [[], ["--as-is"]])
def test_nothing_of_the_users_is_sent_or_removed(
    how: list[str], trained: Path, refused: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    model = shutil.copytree(trained / "model", tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    for staging in (own, own / "thesis.txt", tmp_path):
        assert f"{staging} " in refused("push", model, "lab/small", *how, "--staging", staging)
    for staging in (model, model / "new"):
        said = refused("push", model, "lab/small", *how, "--staging", staging)
        assert f"{staging} lies in the model's folder" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_step_pushes_the_model_of_its_run(
    hub: HubServer, llava: Push, write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    path = write_recipe(("epochs = 2", "max_steps = 1"))
    path.write_text(path.read_text() + PUSH)
    out = tmp_path / "run"
    arguments = (path, "--out", out, "--set", "steps.1.skip=true")
    without = llava(*arguments, token=None)
    assert without.returncode == 2
    assert "set HF_TOKEN, or run `hf auth login`" in without.stderr
    assert not out.exists(), "it is said before anything is trained"
    hub.refuse = 401
    refused = llava(*arguments)
    assert refused.returncode == 2
    assert "the token is not known there" in refused.stderr
    hub.refuse = None
    done = llava(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before") == 1
    assert "config.json" in hub.files["lab/small"]
    assert TOKEN not in (out / "events.jsonl").read_text() + (out / "recipe.toml").read_text()


@pytest.mark.parametrize("name", ["a b", "a/b/c", "../x", "lab/", "lab/x--y", "lab/m.git", ""])
def test_names_that_no_hub_has(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "cannot be a name on the hub" in refused("push", tmp_path, name)


def test_a_folder_goes_as_it_is(trained: Path, hub: HubServer, llava: Push, tmp_path: Path) -> None:
    done = llava("push", trained / "model", "lab/own", "--as-is", "--licence", "mit")
    assert done.returncode == 0, done.stderr
    sent = {name for name in hub.files["lab/own"] if name != "README.md"}
    own = {f.relative_to(trained / "model").as_posix()
           for f in (trained / "model").rglob("*") if f.is_file()}  # fmt: skip
    assert sent == own
    head = hub.files["lab/own"]["README.md"].decode().split("---")[1]
    assert yaml.safe_load(head)["license"] == "mit"
    assert yaml.safe_load(head)["library_name"] == "llavakit"
