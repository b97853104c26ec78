"""Steps of a block by liger-kernel: stand-ins with its signatures, as its kernels need a GPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llavakit_kernels.linear_cross_entropy import liger
from llavakit_plugins.language import fused

T, H, G, K = 7, 6, 2, 8


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What liger-kernel was asked for."""
    called: list[str] = []

    class Rope:
        @staticmethod
        def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            called.append("rope")
            assert q.transpose(1, 2).is_contiguous(), "it would be copied"
            return apply_rotary_pos_emb(q, k, cos, sin)

    class SiLUMul:
        @staticmethod
        def apply(a: Tensor, b: Tensor) -> Tensor:
            called.append("swiglu")
            return nn.functional.silu(a) * b

    for name, function in (("rope", Rope), ("swiglu", SiLUMul)):
        module = ModuleType(f"liger_kernel.ops.{name}")
        setattr(module, "LigerRopeFunction" if name == "rope" else "LigerSiLUMulFunction", function)
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", module)
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(fused, "_served", lambda tensor: True)
    return called


def test_rotation_is_that_of_the_formula(served: list[str]) -> None:
    q_THK, k_TGK = torch.randn(T, H, K), torch.randn(T, G, K)
    angles = torch.randn(T, 1, K // 2).repeat(1, 1, 2)
    rotary = (angles.cos(), angles.sin())
    expected = [fused.rotate_one(x, rotary) for x in (q_THK, k_TGK)]
    found = fused.rotate(q_THK.clone(), k_TGK.clone(), rotary)
    assert served == ["rope"]
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("activation", [nn.SiLU(), ACT2FN["silu"], nn.GELU()])
def test_only_silu_is_served(served: list[str], activation: nn.Module) -> None:
    gate, up = torch.randn(2, T, 12)
    torch.testing.assert_close(fused.gate(activation, gate, up), activation(gate) * up)
    assert served == ([] if isinstance(activation, nn.GELU) else ["swiglu"])


def test_nothing_on_a_cpu_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "INSTALLED", True)
    assert not fused._served(torch.ones(1))
