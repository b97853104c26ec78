"""linear_gelu against the error function in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from llavakit_kernels import linear_gelu

Close = Callable[[Tensor, Tensor], None]


def oracle(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    before = features.double() @ weight.double().t()
    if bias is not None:
        before = before + bias.double()
    share: Tensor = 0.5 * torch.special.erfc(-before / 2**0.5)
    return before * share


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(0, 40),
    D=st.sampled_from((1, 8, 33)),
    H=st.sampled_from((1, 16, 40, 65)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    with_bias=st.booleans(),
    recompute=st.booleans(),
    strided=st.booleans(),
    impl=st.sampled_from(("triton", "reference")),
    seed=st.integers(0, 2**31),
)
def test_matches_the_definition_forward_and_backward(
    N: int,
    D: int,
    H: int,
    dtype: torch.dtype,
    with_bias: bool,
    recompute: bool,
    strided: bool,
    impl: Literal["triton", "reference"],
    seed: int,
    close: Close,
) -> None:
    random = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=random).to(dtype)
        return (made.t().contiguous().t() if strided else made).requires_grad_()

    features, weight = leaf(N, D), leaf(H, D)
    bias = leaf(H) if with_bias else None
    leaves = [features, weight] + ([] if bias is None else [bias])
    out = linear_gelu(features, weight, bias, impl=impl, recompute=recompute)
    expected = oracle(features, weight, bias)
    assert out.dtype == dtype
    close(out, expected)
    grad = torch.randn(N, H, generator=random).to(dtype)
    actual = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for one, other in zip(actual, wanted, strict=True):
        close(one, other)


def test_recomputing_keeps_no_activations() -> None:
    def kept(recompute: bool) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            linear_gelu(features, weight, None, recompute=recompute)
        return max(sizes)

    features, weight = torch.randn(50, 4), torch.randn(60, 4, requires_grad=True)
    assert kept(recompute=False) == 50 * 60
    assert kept(recompute=True) == 60 * 4


def test_misfits_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"`weight` must be \[H, D=4\]"):
        linear_gelu(torch.randn(3, 4), torch.randn(5, 6), None)
    with pytest.raises(ValueError, match=r"`bias` must be \[H=5\]"):
        linear_gelu(torch.randn(3, 4), torch.randn(5, 4), torch.randn(4))
    with pytest.raises(ValueError, match="cast one of them"):
        linear_gelu(torch.randn(3, 4), torch.randn(5, 4).half(), None)
