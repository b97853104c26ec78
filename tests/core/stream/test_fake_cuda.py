"""What runs on a GPU alone, with torch's fake tensors: shapes, precisions and devices, no numbers.

They know where each tensor would lie, so that two devices in one operation are an error, and they
have no values, so that whatever makes the host wait for one is an error, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import VISION
from tests.core.peer import Bare
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llavakit import LanguageModel, LlavaModel
from llavakit.model.folder import cast_weights
from llavakit.stream.batch import PackedBatch, pack
from llavakit.stream.encode import Encoded
from llavakit_plugins.connectors.mlp import Mlp, MlpOptions
from llavakit_plugins.language import varlen
from llavakit_plugins.language.causal_lm import CausalLM, CausalLMOptions
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions
from llavakit_plugins.training import compiling
from llavakit_plugins.training.kinds import Group
from llavakit_plugins.training.optimiser import Rates, Updates
from llavakit_plugins.training.schedules import Constant
from llavakit_plugins.vision.clip import Clip, ClipOptions

GPU = torch.device("cuda", 0)
TEXT = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
QWEN = {"model_type": "qwen2", **TEXT}


@pytest.fixture(autouse=True)
def recent_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A recent GPU, and no package flash-attn."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(varlen, "_has_flash_attn", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a driver
    varlen.is_recent.cache_clear()
    yield
    varlen.is_recent.cache_clear()


@contextmanager
def on_gpu(model: LlavaModel) -> Iterator[None]:
    """Let everything lie on the GPU and compute in bfloat16, by autocast as in training."""
    before = torch.get_autocast_dtype("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    fake = torch.empty_like(weight, device=GPU)
                    module._parameters[name] = nn.Parameter(fake, weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=GPU)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast wants a driver
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every kernel for the whole stream that was chosen."""
    chosen: list[Any] = []
    choose = varlen.choose

    def note(*args: Any) -> Any:
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr("llavakit.stream.attention._CHOOSERS", (note,))
    return chosen


def batch(count: int = 2) -> PackedBatch:
    ids = np.arange(1, 12)
    ids[3] = -200
    sample = Encoded(ids, np.arange(11) > 6, max_length=24)  # cuts visual tokens, too
    return pack([sample] * count, range(count), 16)


def language(kind: str) -> LanguageModel:
    if kind == "vicuna":
        return Vicuna(VicunaOptions(config=TEXT))
    return CausalLM(CausalLMOptions(config=QWEN))


@pytest.mark.parametrize("kind", ["vicuna", "causal-lm"])
@pytest.mark.parametrize("learns", [True, False])
def test_a_training_step_is_read_by_one_kernel_and_waits_for_nothing(
    kind: str, learns: bool, kernels: list[Any]
) -> None:
    vision = Clip(ClipOptions(config=VISION))
    connector = Mlp(MlpOptions(), vision_width=32, language_width=64)
    text = language(kind)
    for part in (vision, *([] if learns else [text])):  # as the training step has them
        cast_weights(part, torch.bfloat16)
    model = LlavaModel(vision, connector, text, Bare(), choices={}).requires_grad_(False)
    connector.requires_grad_(True)
    text.requires_grad_(learns)
    with on_gpu(model):
        pixels = torch.empty(2, 3, 32, 32, dtype=torch.bfloat16, device=GPU)
        loss = model.loss(batch().to(model.device), model.features(pixels))
    assert loss.device == GPU
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    assert kernels == [varlen.torch_attention] * 2, "one of the whole stream for each layer"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("kind", ["vicuna", "causal-lm"])
@pytest.mark.parametrize("learns", [True, False])
def test_a_compiled_block_is_one_graph_with_the_kernel_in_it(
    kind: str, learns: bool, kernels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For streams of any length; Vicuna's last block, which leaves rows out, is another one."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(compiling, "BACKEND", backend)
    vision = Clip(ClipOptions(config=VISION))
    connector = Mlp(MlpOptions(), vision_width=32, language_width=64)
    text = language(kind)
    for part in (vision, *([] if learns else [text])):
        cast_weights(part, torch.bfloat16)
    model = LlavaModel(vision, connector, text, Bare(), choices={}).requires_grad_(False)
    connector.requires_grad_(True)
    text.requires_grad_(learns)
    blocks = compiling.Compiled(model, encoder=True)
    try:
        with on_gpu(model):
            for count in (2, 3, 5):
                pixels = torch.empty(count, 3, 32, 32, dtype=torch.bfloat16, device=GPU)
                loss = model.loss(batch(count).to(model.device), model.features(pixels))
                assert loss.requires_grad
    finally:
        blocks.undo()
        torch._dynamo.reset()
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    attending = [own for own in targets if "torch_attn._varlen_attn" in own]
    assert len(attending) == (2 if kind == "vicuna" else 1)
    assert len([own for own in targets if own]) == len(attending) + 1, "and one of the encoder"
    assert not any("packed_attention" in name for own in targets for name in own)
    assert not kernels, "nothing is chosen within a graph"


def test_a_checkpoint_is_restored_to_where_the_fused_optimiser_reads_it() -> None:
    """AdamW's fused kernel takes the address of every tensor, that of the count of steps, too."""
    saved = {
        "parameter/w": torch.ones(3),
        "step/w": torch.tensor(7.0),
        "exp_avg/w": torch.zeros(3),
        "exp_avg_sq/w": torch.zeros(3),
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = nn.Parameter(torch.empty(3, device=GPU))
        optimiser = Updates([Group({"w": weight}, 0.1)], Rates(Constant(), 10, 0.0))
        optimiser.restore(saved)
        found = optimiser.tensors()
    assert set(found) == set(saved)
    assert {name: tensor.device for name, tensor in found.items()} == dict.fromkeys(saved, GPU)
