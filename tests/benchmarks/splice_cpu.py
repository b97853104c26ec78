"""What `project_splice` takes of the host: plain tensors against the operator that traces see.

    python tests/benchmarks/splice_cpu.py [--rounds 7]

Matrices of a few numbers, on a CPU, wall time of one call, forward and with all gradients; the two
by turns, median of the rounds' medians. On a GPU the same work precedes each launch. The eager
PyTorch within is a row of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from llavakit_kernels import operators, project_splice, row_sources
from llavakit_kernels.project_splice import reference

N, T, D, E, V = 8, 24, 16, 16, 32
CALLS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    leaves = [torch.randn(*shape) for shape in ((N, D), (E, D), (E,), (V, E))]
    learning = [leaf.clone().requires_grad_() for leaf in leaves]
    ids, rows, grad = torch.randint(0, V, (T,)), torch.arange(4, 4 + N), torch.randn(T, E)
    sources = row_sources(rows, T)

    def splice(given: list[Tensor]) -> Tensor:
        features, weight, bias, embedding = given
        return project_splice(features, weight, bias, ids, embedding, rows, sources=sources)

    def both() -> None:
        torch.autograd.grad(splice(learning), learning, grad)

    def within() -> None:
        features, weight, bias, embedding = leaves
        reference.forward(features, weight, bias, ids, embedding, rows, sources)

    def within_both() -> None:
        features, weight, _, _ = leaves
        within()
        reference.features_grad(grad, weight, rows)
        reference.weight_grad(grad, features, rows, with_bias=True)
        reference.embedding_grad(grad, ids, sources, V, N)

    ways: dict[str, tuple[Callable[[], object], bool]] = {
        "forward, within": (within, True),
        "forward, plain": (lambda: splice(leaves), True),
        "forward, operator": (lambda: splice(leaves), False),
        "both, within": (within_both, True),
        "both, plain": (both, True),
        "both, operator": (both, False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (way, plain) in ways.items():
            with mock.patch.object(
                operators, "_is_plain", operators._is_plain if plain else lambda given: False
            ):
                taken = statistics.median(microseconds(way) for _ in range(CALLS))
            if number:  # the first round warms up
                times[name].append(taken)
    for name, taken_by_round in times.items():
        print(f"{name:20}{statistics.median(taken_by_round):8.0f} us")


def microseconds(way: Callable[[], object]) -> float:
    begun = time.perf_counter()
    way()
    return (time.perf_counter() - begun) * 1e6


if __name__ == "__main__":
    main()
