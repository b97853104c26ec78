"""Language models of many families, template by template and option by option, as ONNX."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.plugins.onnx_models import HEADS_OF_16, make_model, make_pictures

from llavakit import Exporter, LlavaModel, ModelError, Prefixes, Registry
from llavakit.contracts.data import IMAGE
from llavakit.contracts.model import Sampling
from llavakit.contracts.networks import LanguageModel
from llavakit.testing import ExporterContract

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_ir as ir

from llavakit_plugins.connectors.mlp import Linear
from llavakit_plugins.onnx.exporter import graphs as tracing
from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions
from llavakit_plugins.onnx.runtime import load

pytestmark = pytest.mark.slow
QUESTION = "what colour is it ?"
TEMPLATE = {"use": "vicuna_v1", "system": ""}

FAMILIES: dict[str, dict[str, Any]] = {
    "tied embeddings, llama3 rotary": {
        **HEADS_OF_16,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "yarn rotary": {
        **HEADS_OF_16,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {**HEADS_OF_16, "model_type": "qwen2"},
    "qwen3": {**HEADS_OF_16, "model_type": "qwen3", "head_dim": 24},
    "mistral": {**HEADS_OF_16, "model_type": "mistral", "sliding_window": 12},
    "phi": {**HEADS_OF_16, "model_type": "phi", "partial_rotary_factor": 0.5},
    "phi3": {**HEADS_OF_16, "model_type": "phi3", "pad_token_id": 3},
    "gemma": {**HEADS_OF_16, "model_type": "gemma", "head_dim": 16},
    "gemma2": {**HEADS_OF_16, "model_type": "gemma2", "head_dim": 16, "sliding_window": 12},
    "stablelm": {**HEADS_OF_16, "model_type": "stablelm"},
}  # fmt: skip


def _build(family: str) -> LlavaModel:
    config = FAMILIES[family]
    use = "causal-lm" if "model_type" in config else "vicuna"
    if use not in Registry.installed().all(LanguageModel):
        pytest.skip(f"no language model `{use}` is installed")
    return make_model(config, use=use, template=TEMPLATE)


PLAIN = ("tied embeddings, llama3 rotary", "mistral", "phi", "gemma2")
"""What differs there is the attention alone: grouped queries, a window, soft caps, and rotary
positions outside of it, of whole and of partial heads."""


@pytest.fixture(scope="module")
def traced_visions() -> dict[str, Any]:
    return {}


@pytest.fixture(autouse=True)
def trace_each_vision_once(traced_visions: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder and connector are the same weight by weight in most models here."""
    trace = tracing.trace_vision

    def once(model: LlavaModel) -> Any:
        weights = [*model.vision.parameters(), *model.connector.parameters()]
        content = b"".join(weight.detach().numpy().tobytes() for weight in weights)
        key = sha256(content).hexdigest()
        if key not in traced_visions:
            traced_visions[key] = ir.to_proto(trace(model))
        return ir.from_proto(traced_visions[key])

    monkeypatch.setattr(tracing, "trace_vision", once)


@pytest.mark.parametrize(
    ("operators", "family"),
    [*(("microsoft", name) for name in FAMILIES), *(("plain", name) for name in PLAIN)],
)
def test_every_family_is_the_same_model(operators: str, family: str, tmp_path: Path) -> None:
    model, (one, two) = _build(family), make_pictures(tmp_path)
    options = OnnxOptions.model_validate({"operators": operators})
    figures = Onnx(options).export(model, tmp_path / "out")
    assert figures["fp32 largest"] <= 1e-4
    loaded = load(tmp_path / "out")
    prompts = [(QUESTION, [one]), ("red ?", []), ("is it a circle ?", [two, one])]
    expected = [model.generate_ids(*prompt, max_new_tokens=20) for prompt in prompts]
    assert loaded.answer_ids(prompts, Sampling(20)) == expected
    dialogue: list[Any] = [{"role": "user", "content": f"{IMAGE} {QUESTION}"}]
    dialogue += [{"role": "assistant", "content": "a circle"}, {"role": "user", "content": "red ?"}]
    loaded.generate_ids(dialogue[:1], [one], max_new_tokens=4)
    (kept,) = loaded.prefixes.kept  # the next turn goes on from it
    found = loaded.generate_ids(dialogue, [one], max_new_tokens=20)
    assert [one is kept for one in loaded.prefixes.kept] == [False]
    model.prefixes = Prefixes(0)
    assert found == model.generate_ids(dialogue, [one], max_new_tokens=20)


def test_every_precision_with_weights_beside_the_graph(tmp_path: Path) -> None:
    names = ("q8", "fp16", "int8", "q4")
    least = dict.fromkeys(names, 0.3)
    settings = {"external_data_over": 1000, "block_size": 16, "least_agreement": least}
    options = OnnxOptions.model_validate({"precisions": names, **settings})
    model, (picture, _) = make_model(), make_pictures(tmp_path)
    figures = Onnx(options).export(model, tmp_path / "out")
    assert figures["q8 largest"] < figures["q4 largest"]
    config = json.loads((tmp_path / "out/config.json").read_text())["transformers.js_config"]
    assert config["use_external_data_format"]["decoder_model_merged_q4.onnx"] == 1
    exact = model.logits(QUESTION, [picture]).numpy()
    for name, limit in zip(names, (0.1, 0.01, 0.5, 0.5), strict=True):
        assert list((tmp_path / "out/onnx").glob("decoder*.onnx_data")), "weights lie beside"
        got = load(tmp_path / "out", precision=name).logits(QUESTION, [picture])
        assert 0 < np.abs(got - exact).max() < limit, name


def test_half_precision_weights_are_exported_from_float32(tmp_path: Path) -> None:
    model, (picture, _) = make_model(), make_pictures(tmp_path)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    Onnx(OnnxOptions()).export(model, tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = model.float().logits(QUESTION, [picture]).numpy()
    assert np.abs(load(tmp_path / "out").logits(QUESTION, [picture]) - exact).max() < 1e-4


@pytest.mark.parametrize("way", ["view", "loop"])
def test_a_connector_that_fixes_the_number_of_images_is_named(tmp_path: Path, way: str) -> None:
    class Fixed(Linear):
        name = "fixed"

        def forward(self, features_BPD: torch.Tensor) -> torch.Tensor:
            found = super().forward(features_BPD)
            if way == "view":
                return found.flatten().view(2, features_BPD.shape[1], -1)
            return torch.cat([image[None] for image in found])

    model = make_model(connector="linear")
    fixed = Fixed(
        Linear.Options(), vision_width=model.vision.width, language_width=model.language.width
    )
    model.connector = fixed.eval()
    with pytest.raises(ModelError, match="connector `fixed`"):
        Onnx(OnnxOptions()).export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestOnnx(ExporterContract):
    def build(self) -> Exporter:
        return Onnx(OnnxOptions())

    def model(self) -> LlavaModel:
        return make_model()
