"""Small recipes, to run a component as a user would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llavakit.engine.runner import run
from llavakit.recipe.recipe import Recipe
from llavakit.registry import Registry
from llavakit.testing.samples import byte_tokenizer, make_picture

_PARTS: dict[str, dict[str, Any]] = {
    "vision": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 16,
    },
    "language": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 259,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip

_RECIPE = """\
name = "small"
device = "cpu"
trackers = []

[model]
vision = {{ use = "clip", source = '{folder}/vision' }}
connector = {{ use = "linear" }}
language = {{ use = "vicuna", source = '{folder}/language' }}
template = {{ use = "vicuna_v1", system = "" }}

[[steps]]
use = "pretrain"
train = {{ connector = 1e-2 }}
template = {{ use = "plain" }}
max_steps = 2
batch_size = 4
data = {{ use = "conversations", path = '{folder}/rows.json', images = '{folder}' }}

[[steps]]
use = "finetune"
train = {{ connector = 1e-3, language = 1e-3 }}
max_steps = 2
batch_size = 4
data = {{ use = "conversations", path = '{folder}/rows.json', images = '{folder}' }}

[[steps]]
use = "evaluate"
max_new_tokens = 4
benchmarks = [
  {{ use = "exact-match", data = {{ use = "conversations", path = '{folder}/rows.json', images = '{folder}' }} }},
]
"""  # noqa: E501


def small_recipe(folder: Path) -> Path:
    """Write a recipe whose steps take a second each, with weights and data; return its file.

    A CLIP of 16 patches and a Llama of bytes, both random, and six samples with an image each. Its
    steps are `pretrain`, `finetune` and `evaluate`. A recipe that changes something names it as its
    `base`.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPVisionModel(CLIPVisionConfig(**_PARTS["vision"])).save_pretrained(folder / "vision")
        language = LlamaForCausalLM(LlamaConfig(**_PARTS["language"]))
        language.save_pretrained(folder / "language")
    byte_tokenizer().save_pretrained(folder / "language")
    rows = []
    for number in range(6):
        make_picture(number).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"It is picture {number}."},
        ]
        rows.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    path = folder / "small.toml"
    path.write_text(_RECIPE.format(folder=folder.as_posix()), encoding="utf-8")
    return path


def run_recipe(folder: Path, text: str) -> Path:
    """Run a recipe, given as TOML, in `folder`; return the folder of the run.

    Raises what `llava-run` would say as a sentence: RecipeError and the like.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    registry = Registry.installed()
    run(Recipe.load(path, registry, inputs=True), registry, folder / "run")
    return folder / "run"
