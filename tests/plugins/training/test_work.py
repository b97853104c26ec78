"""The work of a training step, against PyTorch's own count of the operations that it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.conftest import LANGUAGE, VISION, make_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

from llavakit import Dataset, LlavaModel, Registry, Use
from llavakit.model.folder import create_model
from llavakit.recipe.model_choice import ModelRecipe
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.work import peak_tflops, work_of

# so that little but products counts
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlavaModel:
    folder = tmp_path_factory.mktemp("wide")
    CLIPVisionModel(CLIPVisionConfig(**{**VISION, **WIDE})).save_pretrained(folder / "vision")
    Qwen2ForCausalLM(Qwen2Config(**{**LANGUAGE, **WIDE})).save_pretrained(folder / "language")
    make_tokenizer().save_pretrained(folder / "language")
    parts = {
        "vision": {"use": "clip", "source": str(folder / "vision"), "layer": -1},
        "connector": {"use": "mlp"},
        "language": {"use": "causal-lm", "source": str(folder / "language")},
        "template": {"use": "vicuna_v1"},
    }
    return create_model(ModelRecipe.model_validate(parts), Registry.installed(), seed=0)


@pytest.mark.parametrize(
    "train",
    [["connector"], ["language"], ["connector", "language"], ["vision", "connector", "language"]],
    ids="+".join,
)
def test_it_is_what_pytorch_counts(model: LlavaModel, data: Path, train: list[str]) -> None:
    choice = {"use": "conversations", "path": data / "train.json", "images": data / "images"}
    samples = Registry.installed().build(Use[Dataset].model_validate(choice))
    corpus = Corpus(samples, model, model.template, 256)
    batch = corpus.pack(range(6))
    model.requires_grad_(False)
    for part in train:
        getattr(model, part).requires_grad_(True)
    pixels = torch.randn(len(batch.images), 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled("vision" in train):
            features = model.features(pixels)
        model.loss(batch, features).backward()
    work = work_of(model, train).of(
        len(batch.images), len(batch.visual_rows_N), batch.packing.lengths, len(batch.targets_M)
    )
    # short sequences: what attention leaves out of its square does not weigh
    assert work == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_the_peaks_are_those_of_the_data_sheets() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA L40S") == 362
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("NVIDIA A10G") == 70
    assert peak_tflops("Some other card") is None
