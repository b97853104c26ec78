"""project_splice against rows picked one by one in float64, for both implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from llavakit_kernels import project_splice, row_sources
from llavakit_kernels.project_splice import reference

Close = Callable[[Tensor, Tensor], None]
LAYOUTS = ("one run", "runs", "shuffled", "reversed")


@dataclass(frozen=True)
class Case:
    """Random arguments of project_splice, non-contiguous where `strided` says so."""

    visual: int = 37
    text: int = 20
    D: int = 24
    E: int = 40
    V: int = 11
    dtype: torch.dtype = torch.float32
    embedding_dtype: torch.dtype | None = None
    bias: bool = True
    layout: str = "runs"
    strided: bool = False
    index_dtype: torch.dtype = torch.int64
    seed: int = 0

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.seed)
        T = self.visual + self.text

        def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            wide = torch.randn(rows + 1, columns + 3, generator=random).to(dtype)
            if self.strided:
                return wide[1:, 3:] if rows % 2 else wide.t()[3:, 1:].t()
            return wide[1:, 3:].contiguous()

        rows = torch.randperm(T, generator=random)[: self.visual]
        if self.layout == "one run":
            start = int(torch.randint(0, self.text + 1, (), generator=random))
            rows = torch.arange(start, start + self.visual)
        elif self.layout != "shuffled":
            rows = rows.sort(descending=self.layout == "reversed").values
        ids = torch.randint(0, self.V, (T,), generator=random)
        ids[rows] = -200  # the original's mark for an image, no id of the vocabulary
        return (
            matrix(self.visual, self.D, self.dtype),
            matrix(self.E, self.D, self.dtype),
            matrix(1, self.E, self.dtype)[0] if self.bias else None,
            ids.to(self.index_dtype),
            matrix(self.V, self.E, self.embedding_dtype or self.dtype),
            rows.to(self.index_dtype),
        )


def oracle(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    embedding: Tensor,
    visual_rows: Tensor,
) -> Tensor:
    """The definition, row by row."""
    projected = features.double() @ weight.double().t()
    if bias is not None:
        projected = projected + bias.double()
    source = {int(row): i for i, row in enumerate(visual_rows)}
    rows = [
        projected[source[row]] if row in source else embedding[int(token)].double()
        for row, token in enumerate(token_ids)
    ]
    return torch.stack(rows)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    visual = draw(st.integers(0, 40))
    size = st.sampled_from((1, 7, 8, 16, 33, 40, 65))
    return Case(
        visual=visual,
        text=draw(st.integers(0 if visual else 1, 40)),
        D=draw(size),
        E=draw(size),
        V=draw(st.integers(1, 30)),
        dtype=draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        embedding_dtype=draw(st.sampled_from((None, None, torch.float32, torch.bfloat16))),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        strided=draw(st.booleans()),
        index_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        seed=draw(st.integers(0, 2**31)),
    )


def check_forward_and_backward(case: Case, impl: str, deterministic: bool, close: Close) -> None:
    arguments = case.arguments()
    leaves = [
        tensor.detach().requires_grad_()
        for tensor in arguments
        if tensor is not None and tensor.is_floating_point()
    ]
    queue = iter(leaves)
    learning = [
        next(queue) if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in arguments
    ]
    out = project_splice(*learning, impl=impl, check=True, deterministic=deterministic)  # type: ignore[arg-type]
    expected = oracle(*learning)  # type: ignore[arg-type]
    assert out.dtype == arguments[4].dtype
    # What passes through both dtypes carries the coarser one's error.
    coarse = max(case.dtype, out.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    close(out.to(coarse), expected)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    # Non-contiguous, as the slice of a longer stream's gradient would be.
    grad = torch.cat([grad, grad], 1)[:, : out.shape[1]]
    actual = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(expected, leaves, grad.double(), allow_unused=True)
    for leaf, one, other in zip(leaves, actual, wanted, strict=True):
        assert one.dtype == leaf.dtype
        close(one.to(coarse), torch.zeros_like(leaf) if other is None else other)


@settings(max_examples=20, deadline=None)
@given(case=cases(), deterministic=st.booleans())
def test_kernels_match_the_definition(case: Case, deterministic: bool, close: Close) -> None:
    check_forward_and_backward(case, "triton", deterministic, close)


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_reference_matches_the_definition(case: Case, close: Close) -> None:
    check_forward_and_backward(case, "reference", True, close)


def test_no_rows_at_all() -> None:
    case = Case(visual=0, text=0)
    assert project_splice(*case.arguments()).shape == (0, case.E)


def test_row_sources_inverts_the_rows() -> None:
    rows = torch.tensor([5, 0, 3])
    assert row_sources(rows, 7).tolist() == [1, -1, -1, 2, -1, 0, -1]
    arguments = Case().arguments()
    sources = row_sources(arguments[5], len(arguments[3]))
    torch.testing.assert_close(
        project_splice(*arguments, sources=sources), project_splice(*arguments)
    )


@pytest.mark.parametrize("plain", [True, False])
def test_gradients_that_nothing_needs_are_not_computed(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: set[str] = set()

    def noted(name: str) -> None:
        right = getattr(reference, name)

        def grad(*given: Any, **more: Any) -> Any:
            computed.add(name)
            return right(*given, **more)

        monkeypatch.setattr(reference, name, grad)

    ops = ("features_grad", "weight_grad", "embedding_grad")
    for name in ops:
        noted(name)
    monkeypatch.setattr("llavakit_kernels.operators._is_plain", lambda given: plain)
    for place, wanted in ((0, ops[0]), (1, ops[1]), (4, ops[2])):
        arguments = [None if tensor is None else tensor.clone() for tensor in Case().arguments()]
        leaf = arguments[place]
        assert leaf is not None
        leaf.requires_grad_()
        out = project_splice(*arguments)  # type: ignore[arg-type]
        computed.clear()
        out.sum().backward()
        assert computed == {wanted}


def test_autocast_casts_the_product_and_keeps_the_stream(close: Close) -> None:
    arguments = Case().arguments()
    weight = arguments[1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = project_splice(*arguments)
    assert out.dtype == torch.float32
    assert not torch.equal(out, project_splice(*arguments))
    close(out.bfloat16(), oracle(*arguments))
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def replaced(place: int, tensor: Tensor) -> list[Tensor | None]:
    arguments: list[Tensor | None] = list(Case().arguments())
    arguments[place] = tensor
    return arguments


REFUSALS = {
    "features": (replaced(0, torch.randn(37, 24, 1)), r"`features` must be \[N, D\]"),
    "weight": (replaced(1, torch.randn(40, 23)), r"`weight` must be \[E, D=24\]"),
    "bias": (replaced(2, torch.randn(41)), r"`bias` must be \[E=40\]"),
    "token_ids": (replaced(3, torch.randn(57)), "`token_ids` must hold int64 or int32"),
    "embedding": (replaced(4, torch.randn(11, 39)), r"`embedding` must be \[V, E=40\]"),
    "rows": (replaced(5, torch.arange(36)), r"`visual_rows` must be \[N=37\]"),
    "dtype": (replaced(1, torch.randn(40, 24).half()), "`weight` is torch.float16 but `features`"),
    "device": (replaced(4, torch.empty(11, 40, device="meta")), "`embedding` is on meta"),
    "too many": (replaced(3, torch.zeros(30, dtype=torch.int64)), "names 37 rows"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_misfits_are_refused_by_name(name: str) -> None:
    arguments, sentence = REFUSALS[name]
    with pytest.raises(ValueError, match=sentence):
        project_splice(*arguments)  # type: ignore[arg-type]


def test_index_checks_on_demand() -> None:
    features, weight, bias, ids, embedding, rows = Case().arguments()
    for wrong, sentence in ((-1, "the first of them -1"), (57, "outside of the stream's 57")):
        changed = torch.cat([rows[1:], torch.tensor([wrong])])
        with pytest.raises(ValueError, match=sentence):
            project_splice(features, weight, bias, ids, embedding, changed, check=True)
    changed = torch.cat([rows[1:], rows[1:2]])
    with pytest.raises(ValueError, match="more than once"):
        project_splice(features, weight, bias, ids, embedding, changed, check=True)
    text = next(row for row in range(57) if row not in rows.tolist())
    ids[text] = 11
    with pytest.raises(ValueError, match="outside of the embedding's 11 rows, the first of them"):
        project_splice(features, weight, bias, ids, embedding, rows, check=True)
    sources = torch.full((57,), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match="`sources` marks 0 visual rows"):
        project_splice(features, weight, bias, ids, embedding, rows, sources=sources, check=True)


def test_implementations_are_chosen_or_refused() -> None:
    arguments = Case().arguments()
    with pytest.raises(ValueError, match='`impl` must be "auto"'):
        project_splice(*arguments, impl="cuda")  # type: ignore[arg-type]
    wide = replace(Case(), dtype=torch.float64).arguments()
    assert project_splice(*wide).dtype == torch.float64
    with pytest.raises(ValueError, match="the kernels take bfloat16, float16 and float32"):
        project_splice(*wide, impl="triton")
