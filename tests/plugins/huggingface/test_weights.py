"""Reading weights: shards, precision, what does not fit, and one copy only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.plugins.families import config_of, qwen_tokenizer, their_model

from llavakit import ModelError
from llavakit.contracts.packing import Packing
from llavakit_plugins.language.causal_lm import CausalLM
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    their_model("llama").save_pretrained(tmp_path)
    qwen_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def logits_of(language: Any) -> torch.Tensor:
    ids = torch.arange(1, 12)
    with torch.no_grad():
        found: torch.Tensor = language.logits(
            language.hidden(language.embed(ids), Packing.of([11]))
        )
    return found


@pytest.mark.parametrize("component", [Vicuna, CausalLM])
def test_shards_are_read_and_the_precision_is_as_asked(component: Any, tmp_path: Path) -> None:
    theirs = their_model("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    qwen_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    language = component.create(component.Options(source=str(tmp_path), device="cpu")).eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.arange(1, 12)[None]).logits[0]
    torch.testing.assert_close(logits_of(language), expected, atol=1e-5, rtol=1e-5)
    half = component.create(component.Options(source=str(tmp_path), dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    inverse = [b for name, b in half.named_buffers() if name.endswith("inv_freq")]
    assert {b.dtype for b in inverse} == {torch.float32}  # rotary frequencies stay exact


@pytest.mark.parametrize("component", [Vicuna, CausalLM])
def test_weights_that_do_not_fit_are_named(component: Any, folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"

    def refusal(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ModelError) as caught:
            component.create(component.Options(source=str(folder)))
        return str(caught.value)

    said = refusal({key: value for key, value in whole.items() if key != name})
    assert (
        f"does not hold the weights of a LlamaForCausalLM with its config.json: it lacks {name}"
        in said
    )
    said = refusal({**whole, "model.mm_projector.weight": torch.zeros(2, 2)})
    assert "it has, unasked for, model.mm_projector.weight" in said
    said = refusal({**whole, name: torch.zeros(5, 32)})
    assert f"it has, in another shape, {name} [5, 32] for [48, 32]" in said
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged or cut short"):
        component.create(component.Options(source=str(folder)))
    with pytest.raises(ModelError, match=r"no config\.json|neither a folder"):
        component.create(component.Options(source=str(folder / "nowhere")))


def test_vicuna_refuses_other_architectures(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_of("mistral")))
    with pytest.raises(ModelError, match=r"cannot run `mistral`.*use `causal-lm`"):
        Vicuna.create(VicunaOptions(source=str(folder)))


@pytest.mark.parametrize("more", [{}, {"length_penalty": 2.0}], ids=str)
def test_a_generation_config_that_contradicts_itself_can_be_saved(
    folder: Path, more: dict[str, float]
) -> None:
    """As Vicuna's does: it names a temperature and does not sample."""
    told = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 5]}
    (folder / "generation_config.json").write_text(json.dumps(told | more))
    language = Vicuna.create(VicunaOptions(source=str(folder)))
    saved = folder / "saved"
    saved.mkdir()
    language.save(saved)
    assert torch.equal(logits_of(Vicuna.load(language.options, saved)), logits_of(language))
    assert Vicuna.load(language.options, saved).end_ids == language.end_ids
    assert {2, 5} <= language.end_ids
