"""Small models and data, made with other people's classes, for every test."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests import published

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and several tests run at once
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a process that crashes says where
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read at the first import
gc.set_threshold(50_000, 20, 100)  # as in `llava-run`, which does not search what it has imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background has it so, and all
    signal.signal(signal.SIGINT, signal.default_int_handler)  # that is begun here would, too


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out for want of published files."""
    skipped = terminalreporter.stats.get("skipped", [])
    if line := published.left_out([str(report.longrepr) for report in skipped]):
        terminalreporter.write_line(line)


WORDS = [
    "USER",
    ":",
    "ASSISTANT",
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "is",
    "what",
    "colour",
    "shape",
    "the",
    "it",
    "in",
    "picture",
    "?",
    ".",
]

VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256,
}  # fmt: skip


def make_tokenizer() -> Any:
    """Return a word-level tokenizer with <s>, </s>, <unk> and <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vision` (CLIPVisionModel) and `language` (LlamaForCausalLM), random."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("backbones")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder / "vision")
        LlamaForCausalLM(LlamaConfig(**LANGUAGE)).save_pretrained(folder / "language")
    make_tokenizer().save_pretrained(folder / "language")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.json`, LLaVA's format, and `images/`: 24 samples, some text-only."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(24):
        colour = ("red", "blue")[number % 2]
        shade = {"red": (220, 30, 30), "blue": (30, 30, 220)}[colour]
        pixels = np.full((40, 32 + number, 3), shade, np.uint8)
        pixels[: draw.integers(4, 20)] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        first = "what colour is it ?"
        turns = [("human", f"<image>\n{first}"), ("gpt", f"it is {colour} .")]
        row: dict[str, Any] = {"id": f"s{number}", "image": f"{number}.png"}
        if number % 6 == 5:  # text only
            row.pop("image")
            turns[0] = ("human", first)
        if number % 3 == 0:
            turns += [("human", "what shape is the picture ?"), ("gpt", "a square .")]
        row["conversations"] = [{"from": role, "value": text} for role, text in turns]
        rows.append(row)
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


RecipeWriter = Callable[..., Path]

RECIPE = """\
name = "small"
seed = {seed}
device = "cpu"

[model]
connector = {{ use = "mlp" }}

[model.vision]
use = "clip"
source = "{backbones}/vision"

[model.language]
use = "vicuna"
source = "{backbones}/language"

[model.template]
use = "vicuna_v1"
system = ""

[[steps]]
use = "pretrain"
train = {{ connector = 1e-2 }}
template = {{ use = "plain" }}
batch_size = 8
micro_batch_tokens = 128
log_every = 1
checkpoint_every = 2
data = {{ use = "conversations", path = "{pretrain}", images = "{data}/images" }}

[[steps]]
use = "finetune"
train = {{ connector = 1e-2, language = 1e-2 }}
epochs = 2
batch_size = 8
micro_batch_tokens = 128
log_every = 1
checkpoint_every = 2
data = {{ use = "conversations", path = "{data}/train.json", images = "{data}/images" }}
"""


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are oneDNN's wherever they can be, also where the CPU gains nothing by it."""
    monkeypatch.setattr("llavakit_kernels.onednn.faster_here", lambda: True)


@pytest.fixture
def write_recipe(tmp_path: Path, backbones: Path, data: Path) -> RecipeWriter:
    """A function that writes a two-stage recipe of the small model; `change` is replaced in it."""
    rows = json.loads((data / "train.json").read_text())
    brief = [row | {"conversations": row["conversations"][:2]} for row in rows if "image" in row]
    pretrain = tmp_path / "pretrain.json"
    pretrain.write_text(json.dumps(brief))

    def write(*changes: tuple[str, str], seed: int = 0, name: str = "small.toml") -> Path:
        text = RECIPE.format(seed=seed, backbones=backbones, data=data, pretrain=pretrain)
        for old, new in changes:
            assert old in text, f"the recipe has no {old!r}"
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def model(write_recipe: RecipeWriter, tmp_path: Path) -> Path:
    """The folder of a tiny model, as `write_recipe` describes it, untrained."""
    from llavakit import Recipe, Registry
    from llavakit.model.folder import create_model, save_model

    registry = Registry.installed()
    made = create_model(Recipe.load(write_recipe(), registry).model, registry, seed=0)
    save_model(made, tmp_path / "model")
    return tmp_path / "model"


# -- the command line, in the process of the test -------------------------------------------------


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
