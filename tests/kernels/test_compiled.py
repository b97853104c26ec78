"""The kernels compiled for sm_80 and sm_90: the interpreter accepts what the compiler rejects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"
# What an A100 and an H100 give to one program.
SHARED = {"hopper": 232_448, "ampere": 166_912, "tf32": 166_912, "float32": 101_376}
KERNELS = (
    "forward",
    "features_grad",
    "weight_grad",
    "gelu",
    "gelu_save",
    "gelu_backward",
    "segments",
    "atomics",
)
# One configuration of each kind in every run of the tests; all of them take minutes.
CHOSEN = (
    "forward-hopper:0",
    "features_grad-hopper:0",
    "weight_grad-hopper",
    "gelu-hopper:0",
    "segments-hopper",
    "atomics-hopper",
    "forward-ampere:1",
    "weight_grad-float32",
)
EVERY = [f"{kernel}-{family}" for family in SHARED for kernel in KERNELS]


@pytest.fixture
def interpreter() -> None:
    """Not needed here."""


def compiled(*names: str) -> dict[str, list[dict[str, Any]]]:
    roots = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, SCRIPT, *names],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": roots},
    )
    assert run.returncode == 0, run.stderr
    results: dict[str, list[dict[str, Any]]] = json.loads(run.stdout.splitlines()[-1])
    return results


def check(name: str, result: dict[str, Any]) -> None:
    kernel, family = name.split("-")
    assert result["stack"] == 0, f"{name} spills registers: {result}"
    assert not result["serialized"], f"{name} waits for each product: {result}"
    assert result["shared"] <= SHARED[family], f"{name} does not fit: {result}"
    product = kernel not in ("segments", "atomics")
    on_tensor_cores = product and family != "float32"
    assert result["wgmma"] == (product and family == "hopper")
    assert result["mma"] == (on_tensor_cores and family != "hopper")
    assert result["tma"] == (product and family == "hopper")
    assert result["row_offsets"]["i32"] == 0, f"{name} has 32-bit offsets of rows"
    assert result["row_offsets"]["i64"] > 0


def test_chosen_tiles_compile_without_spills() -> None:
    for name, results in compiled(*CHOSEN).items():
        for result in results:
            check(name, result)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_tile_compiles_without_spills(name: str, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.config.option.markexpr:
        pytest.skip("takes minutes: ask for it with -m slow")
    for result in compiled(name)[name]:
        check(name, result)
