"""How kernels are launched on a GPU, walked through here with the interpreter as the device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llavakit_kernels import launch, project_splice, row_sources
from llavakit_kernels.linear_gelu import triton as gelu
from llavakit_kernels.project_splice import triton, triton_backward

GPU_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


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


def test_the_benchmark_walks_through_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    sections = "rates,splice,mlp,loss,configurations"
    command = [sys.executable, str(GPU_SCRIPT), "--dry-run", "--only", sections, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "## splice: goals" in run.stdout
    assert out.exists()


def test_the_training_benchmark_compares_the_same_losses(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(GPU_SCRIPT), "--dry-run", "--only", "training"]
    run = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())
    assert [(row["case"], row["way"]) for row in rows["training"]] == [
        (case, way)
        for case in ("stage 1, tiny", "stage 2, tiny")
        for way in (
            "ours",
            "ours, recomputing",
            "transformers",
            "transformers, checkpointing",
        )
    ]
    assert all(row["differs"] < 1e-5 for row in rows["training"])
    assert all(row["samples_per_s"] > 0 for row in rows["training"])
    assert len(rows["training: goals"]) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_the_benchmark_says_that_it_needs_a_gpu() -> None:
    run = subprocess.run([sys.executable, GPU_SCRIPT], capture_output=True, text=True)
    assert run.returncode == 2
    assert "measures on a CUDA GPU and this machine has none" in run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_correct_on_this_gpu() -> None:
    # Its own process, since this one interprets.
    command = [sys.executable, str(GPU_SCRIPT), "--only", "compilation,correctness"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_the_public_function_takes_the_kernels_on_demand_only() -> None:
    rows, ids = torch.tensor([1]), torch.zeros(2, dtype=torch.int64)
    given = (torch.randn(1, 4), torch.randn(8, 4), None, ids, torch.randn(3, 8), rows)
    torch.testing.assert_close(project_splice(*given, impl="triton"), project_splice(*given))
