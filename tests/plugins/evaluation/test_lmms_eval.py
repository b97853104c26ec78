"""lmms-eval drives our model on a task of its own, where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from tests.conftest import RecipeWriter

import llavakit
from llavakit import Recipe, Registry
from llavakit.model.folder import create_model, save_model

TASK = """\
task: llavakit_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rows.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function local_task.visual
doc_to_text: !function local_task.text
doc_to_target: answer
process_results: !function local_task.results
generation_kwargs:
  max_new_tokens: 5
  temperature: 0
  do_sample: false
metric_list:
  - metric: said
    aggregation: mean
    higher_is_better: true
"""

FUNCTIONS = """\
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")] if doc["image"] else []


def text(doc):
    return doc["question"]


def results(doc, results):
    return {"said": float(results[0] == doc["answer"])}
"""

PROGRAM = """\
import json, sys
from importlib.metadata import entry_points

from lmms_eval import evaluator, models
from lmms_eval.tasks import TaskManager

if not entry_points(group="lmms_eval.models", name="llavakit"):  # an older installed metadata
    from llavakit_plugins.lmms_eval import manifest
    models.MODEL_REGISTRY_V2.register_manifest(manifest)
folder, model = sys.argv[1:]
results = evaluator.simple_evaluate(
    model="llavakit",
    model_args=f"pretrained={model},device=cpu",
    tasks=["llavakit_local"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    batch_size=3,
    bootstrap_iters=10,
)
with open(f"{folder}/results.json", "w") as file:
    json.dump(results["results"]["llavakit_local"], file, default=str)
"""


def test_the_package_registers_itself() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {
        "llavakit": "llavakit_plugins.evaluation.lmms_eval:manifest"
    }
    assert any("lmms-eval" in name for name in project["optional-dependencies"]["lmms-eval"])


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed (some 60 packages): pip install 'llavakit[lmms-eval]'",
)
def test_lmms_eval_asks_our_model(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    registry = Registry.installed()
    recipe = Recipe.load(write_recipe(), registry)
    save_model(create_model(recipe.parts(), registry, seed=0), tmp_path / "model")
    model = llavakit.load(tmp_path / "model", device="cpu")
    rows = []
    for number in range(7):
        image = tmp_path / f"{number}.png"
        Image.effect_noise((30 + number, 40), 80).convert("RGB").save(image)
        question, images = f"what {'colour ' * number}is it ?", [image] if number % 3 else []
        answer = model.generate(question, images=images, max_new_tokens=5)
        own = {"question": question, "image": str(image) if images else "", "answer": answer}
        rows.append(own | ({"answer": "something else"} if number == 6 else {}))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_task.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "local_task.py").write_text(FUNCTIONS)
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), str(tmp_path / "model")],
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["said,none"] == pytest.approx(6 / 7)
