"""How kernels are launched on a GPU, walked through here with the interpreter as the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llavakit_kernels import launch, project_splice, row_sources
from llavakit_kernels.linear_gelu import triton as gelu
from llavakit_kernels.project_splice import triton, triton_backward


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Triton's autotuner between two small tiles; the list grows with each measurement."""
    tiles = [launch.tile(16, 32, 16, 4, 1), launch.tile(32, 16, 32, 4, 1, PIECES=2)]
    times = list[int]()

    def fake_benchmark(run: Any, quantiles: Any) -> list[float]:
        run()
        times.append(len(times))
        return [float(-len(times))] * 3  # the last one wins

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "TILES", {"product": {"x": tiles}, "gelu": {"x": tiles}})
    monkeypatch.setattr(launch, "family", lambda _: "x")
    monkeypatch.setattr(launch, "WEIGHT_GRAD_TILES", {"x": tiles[0]})
    monkeypatch.setattr(launch, "processors", lambda _: 3)
    monkeypatch.setattr(launch, "_properties", lambda _: type("Hopper", (), {"major": 9}))
    make = launch.tuned.__wrapped__

    def tuned(*key: Any) -> Any:
        if key not in made:
            made[key] = make(*key)
            made[key]._do_bench = fake_benchmark
        return made[key]

    made: dict[Any, Any] = {}
    monkeypatch.setattr(launch, "tuned", tuned)
    for module in (triton, triton_backward, gelu):
        monkeypatch.setattr(module, "processors", lambda _: 3)
    return times


def test_tuning_measures_once_for_a_range_of_sizes(measured: list[int]) -> None:
    for count, (N, T) in enumerate(((37, 60), (40, 41)), start=1):
        rows = torch.randperm(T)[:N]
        features, weight, grad = torch.randn(N, 24), torch.randn(40, 24), torch.randn(T, 40)
        ids, embedding = torch.zeros(T, dtype=torch.int64), torch.randn(3, 40)
        out = triton.forward(features, weight, None, ids, embedding, rows, row_sources(rows, T))
        torch.testing.assert_close(out[rows], F.linear(features, weight))
        torch.testing.assert_close(
            triton_backward.features_grad(grad, weight, rows), grad[rows] @ weight
        )
        d_weight, _ = triton_backward.weight_grad(grad, features, rows, False)
        torch.testing.assert_close(d_weight, grad[rows].t() @ features)
        activations, before = gelu.forward(features, weight, None, True)
        torch.testing.assert_close(activations, F.gelu(F.linear(features, weight)))
        torch.testing.assert_close(before, F.linear(features, weight))
        # Three tuned kernels, two tiles each, at the first size; the second is in its range.
        assert len(measured) == 6, count


def test_descriptors_are_for_aligned_matrices() -> None:
    matrix = torch.randn(8, 32)
    assert launch.takes_descriptor(matrix)
    assert launch.takes_descriptor(matrix[:, 4:])
    assert not launch.takes_descriptor(matrix[:, 3:])
    assert not launch.takes_descriptor(matrix[:, :31].contiguous())
    assert not launch.takes_descriptor(matrix.t())
    assert not launch.takes_descriptor(matrix[:0])


@pytest.mark.parametrize(
    ("major", "kilobytes", "expected"),
    [(8, 163, "ampere"), (9, 227, "hopper"), (10, 227, "hopper"), (12, 99, "ampere")],
)
def test_tiles_are_chosen_by_chip(
    monkeypatch: pytest.MonkeyPatch, major: int, kilobytes: int, expected: str
) -> None:
    chip = SimpleNamespace(major=major, shared_memory_per_block_optin=kilobytes * 1024)
    monkeypatch.setattr(launch, "_properties", lambda _: chip)
    assert launch.family(torch.randn(2, 2).bfloat16()) == expected
    assert launch.family(torch.randn(2, 2)) == "float32"


def test_tf32_only_on_demand() -> None:
    matrix = torch.randn(2, 2)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert launch.precision(matrix) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert launch.precision(matrix) == "tf32"
        assert launch.precision(matrix.half()) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_public_function_takes_the_kernels_on_demand_only() -> None:
    rows, ids = torch.tensor([1]), torch.zeros(2, dtype=torch.int64)
    given = (torch.randn(1, 4), torch.randn(8, 4), None, ids, torch.randn(3, 8), rows)
    torch.testing.assert_close(project_splice(*given, impl="triton"), project_splice(*given))
