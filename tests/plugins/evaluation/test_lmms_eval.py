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
from llavakit import Exporter, Recipe, Registry, Use
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
folder, name, arguments = sys.argv[1:]
results = evaluator.simple_evaluate(
    model=name,
    model_args=arguments,
    tasks=["llavakit_local"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    batch_size=3 if name == "llavakit" else 1,
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


needs_lmms_eval = pytest.mark.skipif(
    find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed (some 60 packages): pip install 'llavakit[lmms-eval]'",
)


def write_task(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local_task.yaml").write_text(TASK.format(folder=folder))
    (folder / "local_task.py").write_text(FUNCTIONS)


def evaluate(folder: Path, model: str, arguments: str) -> dict[str, float]:
    """Run the task in a process of its own; return its results."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), model, arguments],
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    results: dict[str, float] = json.loads((folder / "results.json").read_text())
    return results


@pytest.mark.slow
@needs_lmms_eval
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
    write_task(tmp_path, rows)
    results = evaluate(tmp_path, "llavakit", f"pretrained={tmp_path / 'model'},device=cpu")
    assert results["said,none"] == pytest.approx(6 / 7)


@pytest.mark.slow
@needs_lmms_eval
def test_lmms_eval_s_own_model_reads_our_export(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """Its class for models in transformers' layout; answers are those that ours gives itself."""
    registry = Registry.installed()
    recipe = Recipe.load(write_recipe(('system = ""', "")), registry)
    model = create_model(recipe.parts(), registry, seed=0).eval()
    registry.build(Use[Exporter](use="hf")).export(model, tmp_path / "model")
    rows = []
    for number in range(5):
        image = tmp_path / f"{number}.png"
        Image.effect_noise((30 + number, 40), 80).convert("RGB").save(image)
        question = f"what {'colour ' * number}is it ?"
        answer = model.generate(question, images=[image], max_new_tokens=5)
        rows.append({"question": question, "image": str(image), "answer": answer})
    write_task(tmp_path, rows)
    arguments = f"pretrained={tmp_path / 'model'},device=cpu,device_map=cpu,dtype=float32"
    assert evaluate(tmp_path, "llava_hf", arguments)["said,none"] == 1
