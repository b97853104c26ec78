"""Kernel tests run Triton's interpreter on CPU tensors, which must be chosen before its import."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

if os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError(
            "triton was imported before tests/kernels/conftest.py could choose its interpreter: "
            "set TRITON_INTERPRET=1 in the environment or in tests/conftest.py"
        )
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

Close = Callable[[Tensor, Tensor], None]

# Norm-wise, against float64. Triton's interpreter cuts bfloat16 off where hardware rounds.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}


@pytest.fixture(scope="session")
def close() -> Close:
    """Assert that a tensor equals a float64 oracle to its own dtype's precision."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        error = (actual.double() - expected.double()).norm()
        # Sums of numbers near 1 may cancel; their error does not.
        size = expected.double().norm() + expected.numel() ** 0.5
        assert error <= TOLERANCE[actual.dtype] * size, (
            f"{actual.dtype} {tuple(actual.shape)}: off by {error} of {expected.norm()}"
        )

    return check


@pytest.fixture(autouse=True)
def interpreter() -> None:
    """Leave out the tests that cannot run in the interpreter of this Triton with this NumPy."""
    old = triton.__version__.startswith("3.6.")
    if old and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter does not run with NumPy 2.4: install numpy<2.4")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The tensors are tiny: threads only wait for each other, for long on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
