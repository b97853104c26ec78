"""Model cards: what Hugging Face's own reader finds in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from huggingface_hub import ModelCard

from llavakit_plugins.publishing.card import Story, read_story, write_card

MODEL = {
    "vision": {"use": "clip", "source": "openai/clip-vit-large-patch14"},
    "connector": {"use": "mlp"},
    "language": {"use": "vicuna", "source": "lmsys/vicuna-7b-v1.5"},
}
EVALUATE = {"use": "evaluate", "benchmarks": [{"use": "pope"}, {"use": "exact-match"}]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as its folder tells it: trained, evaluated, and not yet exported."""
    steps = [{"use": "finetune", "data": {"use": "conversations", "path": "a.json"}}, EVALUATE]
    recipe = {"name": "mine", "model": MODEL, "steps": [*steps, {"use": "export"}]}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    metrics = {"pope_sighted_f1": 0.859, "exact-match_sighted_accuracy": 0.5, "loss_x": 1.25}
    for step, figures in {"01-finetune": {"loss": 0.75}, "02-evaluate": metrics}.items():
        (tmp_path / step / "model").mkdir(parents=True)
        (tmp_path / step / "artifact.json").write_text(json.dumps({"metrics": figures}))
    return tmp_path


def test_what_the_run_was_is_in_it(run: Path) -> None:
    text = write_card(
        "lab/mine", read_story(run / "01-finetune" / "model"), {"hf": "", "onnx": "onnx"}
    )
    card: Any = ModelCard(text)
    assert card.data.base_model == ["openai/clip-vit-large-patch14", "lmsys/vicuna-7b-v1.5"]
    assert card.data.tags == ["llava", "llavakit", "onnx"]
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {("pope", "sighted_f1"): 0.859, ("exact-match", "sighted_accuracy"): 0.5}
    assert "vision: `openai/clip-vit-large-patch14`, mit" in text
    assert "language: `lmsys/vicuna-7b-v1.5`, llama2" in text
    assert "| 02-evaluate | loss_x | 1.25 |" in text
    assert 'allow_patterns="onnx/*"' in text
    assert 'path = "a.json"' in text


def test_a_licence_that_all_parts_have_is_the_model_s(run: Path) -> None:
    table = (run / "recipe.toml").read_text()
    table = table.replace("openai/clip-vit-large-patch14", "google/siglip-base-patch16-224")
    (run / "recipe.toml").write_text(table.replace("lmsys/vicuna-7b-v1.5", "Qwen/Qwen2.5-0.5B"))
    card: Any = ModelCard(write_card("a/b", read_story(run), {"hf": ""}))
    assert card.data.license == "apache-2.0"
    stated: Any = ModelCard(write_card("a/b", read_story(run), {"hf": ""}, "cc-by-4.0"))
    assert stated.data.license == "cc-by-4.0"


def test_a_model_without_a_run_has_a_card_too(tmp_path: Path) -> None:
    assert read_story(tmp_path / "model") == Story()
    card: Any = ModelCard(write_card("lab/mine", Story(), {"onnx": ""}))
    assert card.data.license == "other"
    assert card.data.eval_results is None
    assert "transformers" not in card.text


def test_keys_in_a_recipe_are_not_in_the_card(run: Path) -> None:
    recipe = (run / "recipe.toml").read_text()
    key = "sk-0123456789abcdefghijklmnop"
    (run / "recipe.toml").write_text(f'{recipe}\n[[trackers]]\nuse = "x"\napi_key = "{key}"\n')
    assert key not in write_card("lab/mine", read_story(run), {"hf": ""})
