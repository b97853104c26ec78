"""linear_cross_entropy against the whole logits in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

from llavakit_kernels import linear_cross_entropy

Close = Callable[[Tensor, Tensor], None]


@settings(max_examples=80, deadline=None)
@given(
    M=st.integers(1, 30),
    E=st.integers(1, 40),
    V=st.integers(2, 60),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
    with_bias=st.booleans(),
    weighted=st.booleans(),
    head_learns=st.booleans(),
    hidden_learns=st.booleans(),
    reduction=st.sampled_from(("sum", "mean")),
    chunk_rows=st.sampled_from((None, 1, 4, 30)),
    impl=st.sampled_from(("auto", "onednn")),
    scale=st.sampled_from((1.0, -3.5)),
    seed=st.integers(0, 2**31),
)
def test_matches_cross_entropy_of_all_logits(
    M: int,
    E: int,
    V: int,
    dtype: torch.dtype,
    with_bias: bool,
    weighted: bool,
    head_learns: bool,
    hidden_learns: bool,
    reduction: Literal["sum", "mean"],
    chunk_rows: int | None,
    impl: Literal["auto", "onednn"],
    scale: float,
    seed: int,
    close: Close,
) -> None:
    random = torch.Generator().manual_seed(seed)

    def leaf(learns: bool, *shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype).requires_grad_(learns)

    hidden, head = leaf(hidden_learns, M, E), leaf(head_learns, V, E)
    bias = leaf(head_learns, V) if with_bias else None
    targets = torch.randint(0, V, (M,), generator=random)
    targets[1::3] = -100
    weights = torch.rand(M, generator=random) if weighted else None
    actual = linear_cross_entropy(
        hidden,
        head,
        targets,
        bias=bias,
        weights=weights,
        reduction=reduction,
        chunk_rows=chunk_rows,
        impl=impl,
    )
    logits = F.linear(hidden.double(), head.double(), None if bias is None else bias.double())
    each = F.cross_entropy(logits, targets, reduction="none")
    factors = (targets >= 0).double() * (1.0 if weights is None else weights.double())
    expected = (each * factors).sum()
    if reduction == "mean":
        expected = expected / factors.sum()
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(actual.to(dtype), expected)
    leaves = [one for one in (hidden, head, bias) if one is not None and one.requires_grad]
    if leaves:
        ours = torch.autograd.grad(actual * scale, leaves)
        theirs = torch.autograd.grad(expected * scale, leaves)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)


def test_all_rows_ignored_costs_nothing_in_a_sum() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 4), torch.full((3,), -100), reduction="sum")
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_no_rows() -> None:
    hidden, head = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64)
    linear_cross_entropy(hidden, head, targets, reduction="sum").backward()
    assert head.grad is not None
    assert not head.grad.any()


@pytest.mark.parametrize("head_learns", [True, False])
def test_logits_of_all_rows_never_exist(head_learns: bool) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.numel = self.products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, Tensor):
                    self.numel = max(self.numel, one.numel())
            self.products += func.name() in ("aten::mm", "aten::mm.out", "aten::addmm_")
            return out

    M, E, V = 64, 4, 50
    hidden = torch.randn(M, E, requires_grad=True)
    head = torch.randn(V, E, requires_grad=head_learns)
    # Modes do not see inside of an operator, so this one's implementation is called directly.
    from llavakit_kernels.linear_cross_entropy.reference import Needs, forward

    with Largest() as largest, torch.no_grad():
        targets = torch.randint(0, V, (M,))
        forward(hidden, head, None, targets, torch.ones(M), Needs(True, head_learns, False), 8)
    assert largest.numel <= max(8 * V, M * E, V * E)
    assert largest.products == 8 * (3 if head_learns else 2)


def test_misfits_are_refused_by_name() -> None:
    hidden, head, targets = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"weight": torch.randn(5, 3)}, r"`weight` must be \[V, E=4\]"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"`targets` must be \[M=3\]"),
        ({"targets": torch.zeros(3)}, "`targets` must hold int64 or int32"),
        ({"bias": torch.zeros(4)}, r"`bias` must be \[V=5\]"),
        ({"weights": torch.zeros(4)}, r"`weights` must be \[M=3\]"),
        ({"weight": head.half()}, "cast one of them"),
        ({"reduction": "none"}, '`reduction` must be "mean" or "sum"'),
        ({"impl": "triton"}, '`impl` must be "auto", "reference", "liger" or'),
        ({"chunk_rows": 0}, "`chunk_rows` must be a positive number"),
        ({"impl": "liger"}, 'impl="liger" cannot serve here'),
    ]
    for change, sentence in refusals:
        with pytest.raises(ValueError, match=sentence):
            linear_cross_entropy(
                **({"hidden": hidden, "weight": head, "targets": targets} | change)
            )


def test_liger_is_called_on_demand_only_and_with_its_own_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A stand-in with the signature of liger-kernel 0.8.5: the package needs a GPU to run.
    from llavakit_kernels.linear_cross_entropy import liger

    calls: list[str] = []

    def stand_in(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
    ) -> Tensor:
        assert accum_dtype == torch.float32
        calls.append(reduction)
        logits = F.linear(input, weight, bias)
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = stand_in  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(liger, "misfit", lambda *_: None)
    hidden, head = torch.randn(6, 4), torch.randn(5, 4)
    targets = torch.tensor([0, 1, -100, 2, 3, 4])
    for reduction in ("sum", "mean"):
        torch.testing.assert_close(
            linear_cross_entropy(hidden, head, targets, reduction=reduction, impl="liger"),
            F.cross_entropy(F.linear(hidden, head), targets, reduction=reduction),
        )
    assert len(calls) == 2
    linear_cross_entropy(hidden, head, targets, chunk_rows=2)  # waits for no device
    assert len(calls) == 2
