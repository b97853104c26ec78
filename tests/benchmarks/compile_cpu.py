"""One training step on a CPU with compiled blocks (`compile = true`) against the same without.

    python tests/benchmarks/compile_cpu.py [--rounds 5] [--models tiny,llama]

`tiny` is that of train_cpu.py; `llama` has 4 layers of SmolLM2's width, 576, behind tiny's encoder.
Stage 1 and stage 2, the encoder's features kept and computed each time. One thread, CPU time, the
two in alternation, median of paired ratios: above 1 where compiled blocks are faster. `first` is
the CPU time of a model's first two compiled steps, in which PyTorch compiles. Prints a table, and
exits with 1 where losses or gradients differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.startup import machine
from tests.benchmarks.train_cpu import SHAPES, Ours, Shape, cpu_seconds, make_samples
from tests.core.peer import make_pair

from llavakit import LlavaModel
from llavakit_plugins.training.compiling import Compiled

LLAMA = SHAPES["smollm2"].language | {"num_hidden_layers": 4, "vocab_size": 8192}
MODELS = {
    "tiny": SHAPES["tiny"],
    "llama": SHAPES["tiny"]._replace(language=LLAMA, capacity=2048, samples=8),
}
SAME = 1e-5


def learn(model: LlavaModel, *, language: bool) -> None:
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    model.language.requires_grad_(language)


def difference(plain: Ours, compiled: Ours) -> float:
    """Return the largest difference of loss and gradients, in shares of a gradient's norm."""
    found = []
    for ours in (plain, compiled):
        ours.model.zero_grad(set_to_none=True)
        loss = ours.loss()
        grads = {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
        found.append((loss, grads))
    (loss, expected), (other, grads) = found
    if expected.keys() != grads.keys():
        raise SystemExit("compiled blocks have gradients for other weights")
    apart = [float((grads[n] - expected[n]).norm() / expected[n].norm()) for n in expected]
    return max([float((other - loss).abs() / loss), *apart])


def compare(
    name: str, model: LlavaModel, shape: Shape, cached: bool, stage: int, rounds: int
) -> bool:
    """Print a row; return whether both ways compute the same."""
    samples = make_samples(shape.samples, *((22, 0.35) if stage == 1 else (298, 0.55)), seed=1)
    edge = shape.vision["image_size"]
    pixels = torch.randn(shape.samples, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    learn(model, language=stage == 2)
    plain, compiled = (
        Ours(one, samples, pixels, shape.capacity) for one in (model, copy.deepcopy(model))
    )
    if cached:
        plain.cache()
        compiled.cache()
    blocks = Compiled(compiled.model, encoder=not cached)
    first = sum(cpu_seconds(compiled.loss, compiled.model) for _ in range(2))
    apart = difference(plain, compiled)
    pairs = [
        (cpu_seconds(plain.loss, plain.model), cpu_seconds(compiled.loss, compiled.model))
        for _ in range(rounds)
    ]
    blocks.undo()
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"{name:6} stage {stage}, {'kept' if cached else 'computed':10}{before:8.2f} s"
        f"{after:8.2f} s{ratio:8.2f}x{first:8.1f} s{apart:10.1e}",
        flush=True,
    )
    return apart < SAME


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print("model, stage, features          as it is compiled   ratio   first     apart")
    same = True
    for name in options.models.split(","):
        shape = MODELS[name]
        _, model = make_pair(shape.vision, shape.language, encoder=shape.encoder)
        for stage in (1, 2):
            for cached in (True, False):
                same &= compare(name, model, shape, cached, stage, options.rounds)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
