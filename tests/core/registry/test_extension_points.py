"""What authors of plugins asked for: somebody else's package uses each place, in one run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llavakit.testing import small_recipe

SOURCE = Path(__file__).parents[2] / "third_party" / "llava_points"

RECIPE = """\
name = "points"
device = "cpu"
trackers = []

[[steps]]
use = "generate"
contexts = '{folder}/contexts.jsonl'
generator = {{ use = "tagger" }}

[[steps]]
use = "pretrain"
train = {{ connector = 1e-2 }}
template = {{ use = "plain" }}
max_steps = 2
batch_size = 4
callbacks = [{{ use = "average", decay = 0.25 }}]
data = {{ use = "conversations", path = "@generate/tags.json", images = '{folder}' }}

[[steps]]
use = "evaluate"
max_new_tokens = 1
benchmarks = [
  {{ use = "likely", data = {{ use = "conversations", path = '{folder}/rows.json', images = '{folder}' }} }},
]

[model]
vision = {{ use = "clip", source = '{folder}/vision' }}
connector = {{ use = "placed" }}
language = {{ use = "pointing", source = '{folder}/language' }}
template = {{ use = "vicuna_v1", system = "" }}
"""  # noqa: E501

Environment = dict[str, str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("points")
    source = shutil.copytree(SOURCE, folder / "source")
    site = folder / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, *options, str(source)], check=True)
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def python(installed: Environment, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=installed, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ran(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that uses all of them."""
    folder = tmp_path_factory.mktemp("run")
    small_recipe(folder)
    rows = [
        {
            "id": f"c{number}", "image": f"{number}.png", "captions": [f"Picture {number}."],
            "instances": [{"category": f"<point>{number}</point>", "bbox": [0, 0, 1, 1]}],
        }
        for number in range(6)
    ]  # fmt: skip
    (folder / "contexts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder.as_posix()))
    python(installed, "-m", "llavakit", str(recipe), "--out", str(folder / "run"))
    return folder / "run"


def events(ran: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (ran / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == name]


def test_a_generator_has_sorts_of_response_of_its_own(ran: Path) -> None:
    step = ran / "01-generate"
    tags = json.loads((step / "tags.json").read_text())
    assert [row["conversations"][1]["value"] for row in tags] == [
        f"<point>{number}</point>" for number in range(6)
    ]
    assert len(json.loads((step / "caption.json").read_text())) == 6


def test_a_connector_knows_the_number_of_patches_when_it_is_built(ran: Path) -> None:
    saved = load_file(ran / "02-pretrain" / "model" / "connector.safetensors")
    # 16 patches of the small CLIP: its edge is 32 / 8
    assert {name: tuple(t.shape) for name, t in saved.items()} == {
        "project.weight": (32, 32), "project.bias": (32,), "rows_RE": (4, 32),
        "columns_CE": (4, 32),
    }  # fmt: skip


def test_a_callback_follows_the_training_and_has_the_last_word(ran: Path) -> None:
    import torch

    step = ran / "02-pretrain"
    kept = torch.load(step / "average.pt", weights_only=True)
    saved = load_file(step / "model" / "connector.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())
    assert [event["at"] for event in events(ran, "average")] == [1, 2]


def test_a_benchmark_scores_by_likelihood(ran: Path, installed: Environment) -> None:
    """The same by transformers' way: the logits of a model that is loaded from the run's folder."""
    code = f"""
import llavakit
model = llavakit.load({str(ran / "model")!r})
read = model.language.tokenizer
ids = [read(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")]
for number in range(6):
    image = {str(ran.parent)!r} + f"/{{number}}.png"
    next_V = model.logits("Is it picture 0?", images=[image])[-1]
    print(("yes", "no")[int(next_V[ids].argmax())])
"""
    (kept,) = (ran / "03-evaluate").glob("*/likelier.txt")
    assert kept.read_text() == python(installed, "-c", code)
    answers = kept.read_text().split()
    truth = ["yes", *["no"] * 5]
    right = sum(map(str.__eq__, answers, truth))
    metrics = json.loads((ran / "03-evaluate" / "artifact.json").read_text())["metrics"]
    assert right / 6 in [pytest.approx(value) for value in metrics.values()]


def test_a_language_model_adds_tokens_that_the_text_is_read_with(
    ran: Path, installed: Environment
) -> None:
    code = f"""
import llavakit
model = llavakit.load({str(ran / "model")!r})
tokenizer = model.language.tokenizer
ids = tokenizer("a<point>b</point>", add_special_tokens=False).input_ids
table_VE, head_VE = model.language.embedding_VE, model.language.head.weight
print(len(ids), len(tokenizer), len(table_VE), len(head_VE))
"""
    assert python(installed, "-c", code).split() == ["4", "261", "261", "261"]


def test_its_recipes_are_listed_with_their_package(installed: Environment) -> None:
    listed = python(installed, "-m", "llavakit", "recipes")
    (line,) = [line for line in listed.splitlines() if "points/small" in line]
    assert "llava-points" in line
