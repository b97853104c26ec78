"""One optimisation step on a CPU: ours, packed, against transformers' own LLaVA on padded batches.

    python tests/benchmarks/train_cpu.py [--rounds 7]

Both have the same weights and see the same samples, with lengths like those of the paper's data:
256 visual tokens, then about 22 text tokens in stage 1 and 298 in stage 2. One thread, CPU time,
the two in alternation, median of paired ratios. Prints a table, and exits with 1 where losses or
gradients differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.core.peer import IMAGE_TOKEN, make_pair

from llavakit import LlavaModel
from llavakit.stream.batch import pack
from llavakit.stream.encode import IMAGE_ID, Encoded
from llavakit_plugins.training.best_fit import best_fit

VISION = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 224, "patch_size": 14, "projection_dim": 128,
}  # fmt: skip
LANGUAGE = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": 1024, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CAPACITY = 4096
LIMITS = {"stage 1": 1.35, "stage 1, cached features": 1.45, "stage 2": 2.3}


def make_samples(count: int, mean: float, spread: float, seed: int) -> list[Encoded]:
    """Return samples of one image and log-normal text lengths; the latter half is learned."""
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        length = int(np.clip(draw.lognormal(np.log(mean) - spread**2 / 2, spread), 6, 1600))
        ids = draw.integers(3, IMAGE_TOKEN, length + 1)
        ids[1] = IMAGE_ID
        supervised = np.arange(length + 1) > (2 if mean < 50 else length // 2)
        samples.append(Encoded(ids.astype(np.int64), supervised))
    return samples


class Ours:
    """Our step over micro-batches of the packed stream."""

    def __init__(self, model: LlavaModel, samples: list[Encoded], pixels: Tensor) -> None:
        lengths = [sample.length(model.visual_tokens) for sample in samples]
        bins = best_fit(lengths, CAPACITY)
        chosen = [[samples[index] for index in items] for items in bins]
        self.batches = [
            pack(part, items, model.visual_tokens) for part, items in zip(chosen, bins, strict=True)
        ]
        self.model, self.pixels = model, pixels
        self.cached: Tensor | None = None
        self.targets = sum(len(batch.targets_M) for batch in self.batches)

    def cache(self) -> None:
        with torch.no_grad():
            self.cached = self.model.features(self.pixels)

    def loss(self) -> Tensor:
        """Return the mean loss of the step, its gradients added up on the way."""
        total = torch.zeros(())
        for batch in self.batches:
            rows = [sample for sample, _ in batch.images]
            if self.cached is not None:
                features = self.cached[rows]
            else:
                with torch.no_grad():
                    features = self.model.features(self.pixels[rows])
            loss = self.model.loss(batch, features) / self.targets
            loss.backward()
            total += loss.detach()
        return total


class Theirs:
    """transformers' step over padded batches of like size, in the samples' order."""

    def __init__(self, model: Any, samples: list[Encoded], pixels: Tensor, visual: int) -> None:
        self.model, self.batches = model, []
        rows = [sample.expand(visual) for sample in samples]
        self.targets = sum(int(row.supervised[1:].sum()) for row in rows)
        mean = sum(len(row.token_ids) for row in rows) / len(rows)
        size = max(1, round(CAPACITY / mean))
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            longest = max(len(row.token_ids) for row in part)
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, -100)
            for number, row in enumerate(part):
                length = len(row.token_ids)
                values = np.where(row.visual, IMAGE_TOKEN, row.token_ids)
                ids[number, :length] = torch.from_numpy(values)
                mask[number, :length] = 1
                supervised = np.where(row.supervised, row.token_ids, -100)
                labels[number, :length] = torch.from_numpy(supervised)
            self.batches.append((ids, mask, labels, pixels[begin : begin + len(part)]))

    def loss(self) -> Tensor:
        total = torch.zeros(())
        for ids, mask, labels, pixels in self.batches:
            logits = self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=-100,
                reduction="sum",
            )
            (loss / self.targets).backward()
            total += loss.detach() / self.targets
        return total


def learn(ours: LlavaModel, theirs: Any, *, language: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Thaw the connector, and the language model where asked; return the trained pairs."""
    projector = theirs.model.multi_modal_projector
    connector = dict(ours.connector.named_parameters())
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "connector.0": (connector["layers.0.weight"], projector.linear_1.weight),
        "connector.2": (connector["layers.2.weight"], projector.linear_2.weight),
    }
    ours.requires_grad_(False)
    theirs.requires_grad_(False)
    ours.connector.requires_grad_(True)
    projector.requires_grad_(True)
    if language:
        ours.language.requires_grad_(True)
        theirs.model.language_model.requires_grad_(True)
        theirs.lm_head.requires_grad_(True)
        mine = dict(ours.language.named_parameters())
        pairs |= {
            name: (mine[f"model.model.{name}"], yours)
            for name, yours in theirs.model.language_model.named_parameters()
        }
        pairs["head"] = (ours.language.head.weight, theirs.lm_head.weight)
    return pairs


def cpu_seconds(step: Callable[[], Tensor], model: Any) -> float:
    """Return the CPU time of one step, gradients cleared first."""
    model.zero_grad(set_to_none=True)
    begun = time.process_time()
    step()
    return time.process_time() - begun


def compare(
    name: str, ours: Ours, theirs: Theirs, rounds: int, count: int
) -> tuple[str, float, float, float]:
    cpu_seconds(ours.loss, ours.model)
    cpu_seconds(theirs.loss, theirs.model)
    pairs = [
        (cpu_seconds(ours.loss, ours.model), cpu_seconds(theirs.loss, theirs.model))
        for _ in range(rounds)
    ]
    mine = count / statistics.median(a for a, _ in pairs)
    peer = count / statistics.median(b for _, b in pairs)
    return name, mine, peer, statistics.median(b / a for a, b in pairs)


def check(ours: Ours, theirs: Theirs, pairs: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference of loss and trained gradients."""
    ours.model.zero_grad(set_to_none=True)
    theirs.model.zero_grad(set_to_none=True)
    worst = abs(float(ours.loss() - theirs.loss()))
    for name, (mine, yours) in pairs.items():
        assert mine.grad is not None, name
        assert yours.grad is not None, name
        scale = max(1.0, float(yours.grad.abs().max()))
        worst = max(worst, float((mine.grad - yours.grad).abs().max()) / scale)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    theirs, ours = make_pair(VISION, LANGUAGE)
    visual = ours.visual_tokens
    rows, differences = [], []
    for stage, mean, spread, count in (("stage 1", 22, 0.35, 32), ("stage 2", 298, 0.55, 32)):
        samples = make_samples(count, mean, spread, seed=1)
        pixels = torch.randn(count, 3, 224, 224)
        pairs = learn(ours, theirs, language=stage == "stage 2")
        mine, peer = Ours(ours, samples, pixels), Theirs(theirs, samples, pixels, visual)
        differences.append(check(mine, peer, pairs))
        rows.append(compare(stage, mine, peer, arguments.rounds, count))
        if stage == "stage 1":
            mine.cache()
            rows.append(compare(f"{stage}, cached features", mine, peer, arguments.rounds, count))

    print(f"\n{'samples/s, one thread':28}{'ours':>9}{'peer':>9}{'ratio':>8}{'limit':>8}")
    for name, mine_rate, peer_rate, ratio in rows:
        limit = LIMITS[name]
        verdict = "" if ratio >= limit else "  below"
        print(f"{name:28}{mine_rate:9.2f}{peer_rate:9.2f}{ratio:7.2f}x{limit:7.2f}x{verdict}")
    print(f"largest difference of loss and gradients: {max(differences):.1e} (limit 1e-05)")

    print(f"\n{'how our cost grows, stage 2':28}{'seconds':>9}{'factor':>9}")
    learn(ours, theirs, language=True)
    before = None
    for name, count, mean in (("8 samples of 298 tokens", 8, 298), ("16 samples", 16, 298),
                              ("8 samples of 596 tokens", 8, 596)):  # fmt: skip
        step = Ours(ours, make_samples(count, mean, 0.1, 2), torch.randn(count, 3, 224, 224))
        cpu_seconds(step.loss, ours)
        seconds = statistics.median(cpu_seconds(step.loss, ours) for _ in range(3))
        before = before or seconds
        print(f"{name:28}{seconds:9.2f}{seconds / before:8.2f}x")
    return 0 if max(differences) <= 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
