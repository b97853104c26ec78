"""Weights that are left unread are, once read, those that transformers reads itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import LANGUAGE, VISION
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import llavakit
from llavakit_plugins.huggingface.filling import fill
from llavakit_plugins.huggingface.unread import leave_unread
from llavakit_plugins.huggingface.weights import Weights

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NETWORKS: dict[str, tuple[Any, Any, bool]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LANGUAGE), True),
    "tied": (LlamaForCausalLM, LlamaConfig(**LANGUAGE, tie_word_embeddings=True), True),
    "gemma": (Gemma2ForCausalLM, Gemma2Config(**LANGUAGE, head_dim=12), True),
    "clip": (CLIPVisionModel, CLIPVisionConfig(**VISION), True),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**VISION), True),
    # its experts lie apart in files, and transformers joins them
    "experts": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**LANGUAGE, **EXPERTS), False),
}


def held(module: nn.Module) -> int:
    """Return the bytes that parameters hold."""
    return sum(parameter.untyped_storage().nbytes() for parameter in module.parameters())


def same(found: nn.Module, expected: nn.Module) -> None:
    for mine, theirs in (
        (dict(found.named_parameters()), dict(expected.named_parameters())),
        (dict(found.named_buffers()), dict(expected.named_buffers())),
    ):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as-filed", "converted"])
@pytest.mark.parametrize("name", NETWORKS)
def test_unread_weights_take_no_memory_and_arrive(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    network, config, is_left = NETWORKS[name]
    torch.manual_seed(0)
    network(config).save_pretrained(tmp_path, max_shard_size="40KB")  # several files
    expected = network.from_pretrained(tmp_path, dtype=dtype)
    weights = Weights.within(tmp_path)
    assert weights is not None
    with leave_unread() as unread:
        found = fill(network, config, weights, tmp_path, dtype=dtype)
    assert all((unread.source(p) is not None) == is_left for p in found.parameters())
    assert all(torch.isnan(p).all() for p in found.parameters()) or not is_left
    if is_left:
        assert held(found) <= 4 * len(list(found.parameters()))
    unread.read_mapped(found, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    same(found, expected)
    found.requires_grad_(True)
    for parameter in found.parameters():  # mapped, and yet it can learn
        parameter.data += 1


def test_a_head_that_is_stored_beside_its_twin_is_compared(tmp_path: Path) -> None:
    """Old files of tied models hold both; whether they are one is seen by their numbers alone."""
    config = LlamaConfig(**LANGUAGE, tie_word_embeddings=True)
    whole = LlamaForCausalLM(config)
    state = dict(whole.state_dict())
    assert "lm_head.weight" in state
    for other in (state, {**state, "lm_head.weight": state["lm_head.weight"] + 1}):
        with leave_unread() as unread:
            found: Any = fill(LlamaForCausalLM, config, other, tmp_path, dtype=torch.float32)
        unread.read(found)
        assert torch.equal(found.lm_head.weight, other["lm_head.weight"])
        is_tied = found.lm_head.weight is found.model.embed_tokens.weight
        assert is_tied == (other is state)


def test_on_the_meta_device_tied_weights_stay_one(tmp_path: Path) -> None:
    network, config, _ = NETWORKS["tied"]
    whole = network(config)
    state = {name: t for name, t in whole.state_dict().items() if name != "lm_head.weight"}
    with leave_unread() as unread:
        found = fill(network, config, state, tmp_path, dtype=torch.bfloat16)
    sources = unread.to_meta(found)
    assert all(parameter.is_meta for parameter in found.parameters())
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= sources.keys()
    rotary, expected = (dict(m.named_buffers()) for m in (found, whole))
    assert rotary.keys() == expected.keys() != set()
    assert all(torch.equal(rotary[name], expected[name]) for name in rotary)


@pytest.mark.parametrize("layout", ["llavakit", "hf", "original"])
def test_models_of_every_layout_are_left_unread(
    layout: str, model: Path, tmp_path: Path, llava_run: Callable[..., Any]
) -> None:
    folder = model
    if layout != "llavakit":
        folder = tmp_path / layout
        assert llava_run("export", model, folder, "--format", layout).code == 0
    expected = llavakit.load(folder, device="cpu")
    with leave_unread() as unread:
        found = llavakit.load(folder, device="cpu")
    assert held(found.language) + held(found.vision) < held(found.connector)
    unread.read(found)
    same(found, expected)
