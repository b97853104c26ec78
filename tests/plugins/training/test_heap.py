"""Memory that a step on a CPU frees is the process's for the next step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llavakit_plugins.training import heap

STEPS = """
import resource, sys
import numpy as np
from llavakit_plugins.training import heap

def step():  # 10 pieces of 5 MB, all of them freed
    pieces = [np.ones(5 << 17) for _ in range(10)]

if sys.argv[1] == "settled":
    heap.settle()
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
FEW, MANY = 500, 5_000  # a system may take several pages at once


def pages(how: str, **environment: str) -> int:
    """Return how many pages five steps take from the system."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how],
        env={**given, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")
def test_pages_are_taken_once() -> None:
    assert pages("settled") < FEW
    assert pages("as it is") > MANY
    for told in (
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ):
        assert pages("settled", **told) > MANY


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """musl has no `mallopt`."""

    monkeypatch.setattr("ctypes.CDLL", lambda name: Other())
    heap.settle()
