"""What the kernels write and where: every element, once, nothing else, at 64-bit offsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit_kernels import row_sources
from llavakit_kernels.launch import tile
from llavakit_kernels.linear_gelu import triton as gelu
from llavakit_kernels.project_splice import triton, triton_backward, triton_embedding

TILES = [
    tile(16, 16, 16, 4, 1),
    tile(16, 64, 32, 4, 1, PIECES=2),
    tile(64, 16, 16, 4, 1, FLATTEN=0, PER_SM=5),
]


def splice_arguments(N: int, T: int, D: int, E: int, V: int) -> list[Any]:
    torch.manual_seed(0)
    rows = torch.randperm(T)[:N]
    ids = torch.randint(0, V, (T,))
    ids[rows] = 2**40  # an id that would be read far outside of the table
    return [
        torch.randn(N, D),
        torch.randn(E, D),
        torch.randn(E),
        ids,
        torch.randn(V, E),
        rows,
        row_sources(rows, T),
    ]


def expected_splice(arguments: list[Any]) -> Tensor:
    features, weight, bias, ids, embedding, rows, sources = arguments
    out = torch.zeros(len(ids), weight.shape[0])
    text = sources < 0
    out[text] = embedding[ids[text]].float()
    out[rows] = F.linear(features, weight, bias)
    return out


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("config", TILES, ids=str)
def test_poisoned_output_is_wholly_written(config: Any, tma: bool) -> None:
    for N, T in ((0, 21), (21, 21), (37, 60)):
        arguments = splice_arguments(N, T, 24, 40, 9)
        # One row and some columns around the output must keep the poison.
        around = torch.full((T + 2, 40 + 5), torch.nan)
        out = around[1:-1, :40]
        triton.forward(*arguments, out=out, config=config, tma=tma)
        torch.testing.assert_close(out, expected_splice(arguments))
        assert torch.isnan(around).sum() == around.numel() - out.numel()


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("config", TILES, ids=str)
def test_poisoned_gradients_and_activations_are_wholly_written(config: Any, tma: bool) -> None:
    torch.manual_seed(0)
    N, T, D, E = 37, 60, 24, 40
    rows = torch.randperm(T)[:N]
    grad, weight, features = torch.randn(T, E), torch.randn(E, D), torch.randn(N, D)
    out = torch.full((N, D), torch.nan)
    triton_backward.features_grad(grad, weight, rows, out=out, config=config, tma=tma)
    torch.testing.assert_close(out, grad[rows] @ weight)
    d_weight, d_bias = triton_backward.weight_grad(
        grad, features, rows, True, config=config, tma=tma
    )
    torch.testing.assert_close(d_weight, grad[rows].t() @ features)
    torch.testing.assert_close(d_bias, grad[rows].sum(0))
    activations = torch.full((N, E), torch.nan)
    bias = torch.randn(E)
    before = F.linear(features, weight, bias)
    gelu.forward(features, weight, bias, False, out=activations, config=config, tma=tma)
    torch.testing.assert_close(activations, F.gelu(before))
    slope = torch.full((N, E), torch.nan)
    gelu.before_grad(grad[:N], features, weight, bias, out=slope, config=config, tma=tma)
    torch.testing.assert_close(slope, torch.ops.aten.gelu_backward(grad[:N], before))


def test_weight_gradient_of_many_images_is_summed_in_parts() -> None:
    torch.manual_seed(0)
    N, T, D, E = 1100, 1500, 16, 24
    rows, grad, features = torch.randperm(T)[:N], torch.randn(T, E), torch.randn(N, D)
    config = tile(16, 16, 64, 4, 1)
    assert triton_backward._parts(tiles=4, rows=N, units=3) > 1
    d_weight, d_bias = triton_backward.weight_grad(grad, features, rows, True, config=config)
    torch.testing.assert_close(d_weight, grad[rows].t() @ features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d_bias, grad[rows].sum(0), rtol=1e-4, atol=1e-4)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses of every masked store of the interpreter."""
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    store, seen = builder.create_masked_store, list[Any]()

    def recording(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.append(np.broadcast_to(pointers.data, mask.data.shape)[mask.data])
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_store", recording)
    return seen


@pytest.mark.parametrize("config", TILES, ids=str)
def test_every_element_is_written_exactly_once(writes: list[Any], config: Any) -> None:
    arguments = splice_arguments(37, 60, 24, 40, 9)
    out = triton.forward(*arguments, config=config)
    addresses = np.sort(np.concatenate(writes).astype(np.int64)) - out.data_ptr()
    assert np.array_equal(addresses, np.arange(out.numel()) * out.element_size())


def far_apart(rows: int, columns: int) -> Tensor:
    """A matrix whose last row begins beyond 2^31 elements; only its pages in use exist."""
    stride = 2**31 // (rows - 2)
    stride -= stride % 16
    storage = torch.empty(stride * (rows - 1) + columns, dtype=torch.float16)
    assert storage.numel() > 2**31
    return storage.as_strided((rows, columns), (stride, 1))


def test_offsets_beyond_two_to_the_31() -> None:
    N, T, D, E = 20, 40, 16, 24
    arguments = splice_arguments(N, T, D, E, 40)
    arguments[:3] = [tensor.half() for tensor in arguments[:3]]
    table = far_apart(40, E)
    table.copy_(arguments[4])
    arguments[4] = table
    expected = expected_splice([tensor.float() for tensor in arguments[:3]] + arguments[3:])
    out = far_apart(T, E)
    triton.forward(*arguments, out=out)
    torch.testing.assert_close(out.contiguous(), expected.half(), rtol=2e-3, atol=2e-3)

    # The same rows as an incoming gradient, for all three backward kernels.
    features, weight, _, ids, _, rows, sources = arguments
    near = out.contiguous()
    for kernel, given in (
        (triton_backward.features_grad, (weight, rows)),
        (triton_backward.weight_grad, (features, rows, True)),
        (triton_embedding.embedding_grad, (ids, sources, 40, True)),
        (triton_embedding.embedding_grad, (ids, sources, 40, False)),
    ):
        torch.testing.assert_close(kernel(out, *given), kernel(near, *given))


def test_wrong_indices_touch_no_memory() -> None:
    arguments = splice_arguments(5, 12, 8, 16, 9)
    arguments[5] = torch.tensor([0, 12, -1, 2**31, 3])
    sources = torch.full((12,), -1, dtype=torch.int32)
    sources[[0, 3]] = torch.tensor([0, 4], dtype=torch.int32)
    arguments[6] = sources
    arguments[3] = torch.full((12,), 2**40)
    out = triton.forward(*arguments)
    assert torch.isfinite(out[[0, 3]]).all()
    assert torch.isnan(out[sources < 0]).all()
