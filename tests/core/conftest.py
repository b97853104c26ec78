"""The command line, run in the process of the test; and what makes a built-in recipe tiny."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from tests.conftest import LANGUAGE, VISION, make_tokenizer


class Outcome(NamedTuple):
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def llava_run(capsys: pytest.CaptureFixture[str]) -> Command:
    """A function that runs `llava-run` with these arguments, in this process."""
    from llavakit.cli import main

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture
def refused(llava_run: Command) -> Callable[..., str]:
    """A function that runs `llava-run`, expects exit code 2, and returns its sentence."""

    def call(*arguments: object) -> str:
        code, _, err = llava_run(*arguments)
        assert code == 2, err
        assert "Traceback" not in err
        assert "error: " in err
        return err.partition("error: ")[2].strip()

    return call


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, backbones: Path) -> Mapping[str, Path]:
    """A folder of tiny random weights for each component that a recipe names."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    from llavakit import Exporter, Registry, Use
    from llavakit.model.folder import create_model
    from llavakit.recipe.model_choice import ModelRecipe

    folder = tmp_path_factory.mktemp("weights")
    tokenizer = make_tokenizer()
    make_tokenizer().save_pretrained(folder / "wide")
    tokenizer.chat_template = CHATML
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(folder / "siglip")
        Qwen2ForCausalLM(Qwen2Config(**LANGUAGE)).save_pretrained(folder / "causal-lm")
        wide = {**LANGUAGE, "hidden_size": 128, "intermediate_size": 256}
        LlamaForCausalLM(LlamaConfig(**wide)).save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "causal-lm")
    parts = {
        "vision": {"use": "clip", "source": str(backbones / "vision")},
        "connector": {"use": "mlp"},
        "language": {"use": "vicuna", "source": str(backbones / "language")},
        "template": {"use": "vicuna_v1"},
    }
    model = create_model(ModelRecipe.model_validate(parts), Registry.installed(), seed=0)
    whole = folder / "whole"
    Registry.installed().build(Use[Exporter](use="original")).export(model, whole)
    return {
        "clip": backbones / "vision",
        "vicuna": backbones / "language",
        "siglip": folder / "siglip",
        "causal-lm": folder / "causal-lm",
        "wide": folder / "wide",  # as the kernels of weights of 4 bits want them on any CPU
        "whole": whole,
    }


@pytest.fixture(scope="session")
def science(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like ScienceQA's: six problems, some with an image."""
    folder = tmp_path_factory.mktemp("scienceqa")
    problems = {}
    for number in range(6):
        split = "train" if number < 4 else "test"
        problems[str(number)] = {
            "question": "what colour is it ?", "choices": ["red", "blue"], "answer": number % 2,
            "hint": "a circle" if number % 3 else "", "image": None, "subject": "natural science",
            "grade": "grade3", "lecture": "colour is what it is .", "solution": "it is red .",
            "split": split,
        }  # fmt: skip
        if number % 2 == 0:
            place = folder / split / str(number)
            place.mkdir(parents=True)
            Image.new("RGB", (40, 30), (250, 20, 20)).save(place / "image.png")
            problems[str(number)]["image"] = "image.png"
    (folder / "problems.json").write_text(json.dumps(problems))
    return folder


@pytest.fixture
def pretrain(tmp_path: Path, data: Path) -> Path:
    rows = json.loads((data / "train.json").read_text())
    brief = [row | {"conversations": row["conversations"][:2]} for row in rows if "image" in row]
    (tmp_path / "captions.json").write_text(json.dumps(brief))
    return tmp_path / "captions.json"
