"""One optimisation step on a CPU: ours, packed, against transformers' own LLaVA on padded batches.

    python tests/benchmarks/train_cpu.py [--rounds 7] [--models tiny,smollm2]
        [--products torch,onednn]

Both have the same weights and see the same samples, with lengths like those of the paper's data:
the visual tokens, then about 22 text tokens in stage 1 and 298 in stage 2. `tiny` has the widths of
the recipe of that name; `smollm2` is SmolLM2-135M behind SigLIP base (random weights, 8 samples).
One thread, CPU time, the two in alternation, median of paired ratios. `share` is the rate of the
products that our step cannot do without over that of a product of 1024 x 1024 x 1024 in the same
round. With `--products onednn` our linear layers multiply by it, and so does what the share is
of. Prints a table, and exits with 1 where losses or gradients differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.startup import machine
from tests.core.peer import IMAGE_TOKEN, make_pair

from llavakit import LlavaModel
from llavakit.stream.batch import pack
from llavakit.stream.encode import IMAGE_ID, Encoded
from llavakit_kernels import onednn
from llavakit_plugins.huggingface.products import Products
from llavakit_plugins.training.best_fit import best_fit
from llavakit_plugins.vision.clip import Clip
from llavakit_plugins.vision.siglip import Siglip
from llavakit_plugins.vision.vision_transformer import TransformersEncoder


class Shape(NamedTuple):
    """A model, and how many tokens a micro-batch holds."""

    encoder: type[TransformersEncoder]
    vision: dict[str, Any]
    language: dict[str, Any]
    capacity: int
    samples: int
    limits: tuple[float, float, float]  #: Ratios: stage 1, with cached features, stage 2.


SHAPES = {
    "tiny": Shape(
        Clip,
        {
            "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
            "num_attention_heads": 4, "image_size": 224, "patch_size": 14, "projection_dim": 128,
        },
        {
            "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
            "num_attention_heads": 4, "vocab_size": 1024, "max_position_embeddings": 2048,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        capacity=4096, samples=32, limits=(2.0, 2.5, 2.8),
    ),
    "smollm2": Shape(
        Siglip,
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
        },
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        capacity=2048, samples=8, limits=(1.8, 1.8, 1.8),
    ),
}  # fmt: skip
SHARE = 0.65


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

    def __init__(
        self, model: LlavaModel, samples: list[Encoded], pixels: Tensor, capacity: int
    ) -> None:
        lengths = [sample.length(model.visual_tokens) for sample in samples]
        bins = best_fit(lengths, capacity)
        chosen = [[samples[index] for index in items] for items in bins]
        self.batches = [
            pack(part, items, model.visual_tokens) for part, items in zip(chosen, bins, strict=True)
        ]
        self.model = model
        # what readers of images, or of cached features, hand over for each micro-batch
        self.images = [pixels[[sample for sample, _ in batch.images]] for batch in self.batches]
        self.cached: list[Tensor] | None = None
        self.targets = sum(len(batch.targets_M) for batch in self.batches)

    def cache(self) -> None:
        with torch.no_grad():
            self.cached = [self.model.features(images) for images in self.images]

    def loss(self) -> Tensor:
        """Return the mean loss of the step, its gradients added up on the way."""
        total = torch.zeros(())
        for number, batch in enumerate(self.batches):
            if self.cached is not None:
                features = self.cached[number]
            else:
                with torch.no_grad():
                    features = self.model.features(self.images[number])
            loss = self.model.loss(batch, features) / self.targets
            loss.backward()
            total += loss.detach()
        return total


class Theirs:
    """transformers' step over padded batches of like size, in the samples' order."""

    def __init__(
        self, model: Any, samples: list[Encoded], pixels: Tensor, visual: int, capacity: int
    ) -> None:
        self.model, self.batches = model, []
        rows = [sample.expand(visual) for sample in samples]
        self.targets = sum(int(row.supervised[1:].sum()) for row in rows)
        mean = sum(len(row.token_ids) for row in rows) / len(rows)
        size = max(1, round(capacity / mean))
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
        theirs.lm_head.requires_grad_(True)  # one tensor with the embedding where they are tied
        mine = dict(ours.language.named_parameters())
        pairs |= {
            name: (mine[f"model.model.{name}"], yours)
            for name, yours in theirs.model.language_model.named_parameters()
        }
        pairs["head"] = (ours.language.head.weight, theirs.lm_head.weight)
    return pairs


def operations(ours: Ours, *, language: bool) -> float:
    """Return the operations, two for a multiplication and addition, of a step's products.

    Only what no step can do without: rows that exist, positions a row may see, gradients of what
    learns and of what lies between it and the loss, nothing twice.
    """
    vision: Any = ours.model.vision
    language_model: Any = ours.model.language
    text = language_model.model.config
    width, inner, depth = vision.width, vision.model.config.intermediate_size, vision.depth
    patches = vision.tokens(vision.image_size)
    seen = patches + vision.prefix_tokens
    image = depth * (seen * (4 * width**2 + 2 * width * inner) + 2 * seen**2 * width)
    image += patches * width * 3 * vision.patch_size**2
    E, per_head = text.hidden_size, text.hidden_size // text.num_attention_heads
    keys = 2 * E * per_head * text.num_key_value_heads
    others = 2 * E**2 + 3 * E * text.intermediate_size
    total = 0.0
    for batch in ours.batches:
        rows, targets = len(batch.token_ids_T), len(batch.targets_M)
        positions_T = batch.packing.position_ids_T
        pairs = (text.num_hidden_layers - 1) * int((positions_T + 1).sum())
        pairs += int((positions_T[batch.supervised_rows.index_M] + 1).sum())
        linear = text.num_hidden_layers * keys * rows
        linear += others * (rows * (text.num_hidden_layers - 1) + targets)
        linear += E * text.vocab_size * targets
        visual = len(batch.visual_rows_N)
        total += (linear * (3 if language else 2)) + 3 * 2 * pairs * E
        total += visual * E * (2 * width + 3 * E)
        total += 0 if ours.cached is not None else image * len(batch.images)
    return 2 * total


def cpu_seconds(step: Callable[[], Tensor], model: Any) -> float:
    """Return the CPU time of one step, gradients cleared first."""
    model.zero_grad(set_to_none=True)
    begun = time.process_time()
    step()
    return time.process_time() - begun


def product_rate(products: Products, size: int = 1024) -> float:
    """Return the operations a second of CPU time of a product `[size, size] @ [size, size]`."""
    left, right, out = torch.rand(3, size, size)
    mm = onednn.matmul if products == "onednn" else partial(torch.mm, out=out)
    found = []
    for _ in range(4):
        begun = time.process_time()
        mm(left, right)
        found.append(2 * size**3 / (time.process_time() - begun))
    return max(found)


class Row(NamedTuple):
    name: str
    mine: float  #: Samples a second.
    peer: float
    ratio: float
    share: float
    limit: float


def compare(
    name: str,
    ours: Ours,
    theirs: Theirs,
    work: float,
    rounds: int,
    limit: float,
    products: Products,
) -> Row:
    cpu_seconds(ours.loss, ours.model)  # the peer is warm
    found = [
        (
            cpu_seconds(ours.loss, ours.model),
            cpu_seconds(theirs.loss, theirs.model),
            work / product_rate(products),
        )
        for _ in range(rounds)
    ]
    mine, peer = (statistics.median(column) for column in list(zip(*found, strict=True))[:2])
    count = sum(len(batch.samples) for batch in ours.batches)
    ratio, share = (statistics.median(row[i] / row[0] for row in found) for i in (1, 2))
    row = Row(name, count / mine, count / peer, ratio, share, limit)
    verdict = "" if ratio >= limit else ", ratio below"
    verdict += "" if share >= SHARE else ", share below"
    print(
        f"{name:32}{row.mine:9.2f}{row.peer:9.2f}{ratio:7.2f}x{limit:7.2f}x{share:8.2f}{verdict}",
        flush=True,
    )
    return row


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


def measure(name: str, shape: Shape, rounds: int, products: Products) -> float:
    """Print a shape's rows; return the largest difference of losses and gradients."""
    theirs, ours = make_pair(shape.vision, shape.language, encoder=shape.encoder, products=products)
    worst, limits = 0.0, iter(shape.limits)
    for stage, mean, spread in (("stage 1", 22, 0.35), ("stage 2", 298, 0.55)):
        samples = make_samples(shape.samples, mean, spread, seed=1)
        pixels = torch.randn(shape.samples, 3, 224, 224)
        language = stage == "stage 2"
        pairs = learn(ours, theirs, language=language)
        mine = Ours(ours, samples, pixels, shape.capacity)
        peer = Theirs(theirs, samples, pixels, ours.visual_tokens, shape.capacity)
        worst = max(worst, check(mine, peer, pairs))  # warms both up, too
        work = operations(mine, language=language)
        compare(f"{name}, {stage}", mine, peer, work, rounds, next(limits), products)
        if not language:
            mine.cache()
            work = operations(mine, language=language)
            label = f"{name}, {stage}, cached features"
            compare(label, mine, peer, work, rounds, next(limits), products)
    return worst


def growth(shape: Shape) -> None:
    """Print how our cost grows with samples, and with their lengths."""
    print(f"\n{'how our cost grows, stage 2':32}{'seconds':>9}{'factor':>9}")
    theirs, ours = make_pair(shape.vision, shape.language, encoder=shape.encoder)
    learn(ours, theirs, language=True)
    before = None
    for name, count, mean in (("8 samples of 298 tokens", 8, 298), ("16 samples", 16, 298),
                              ("8 samples of 596 tokens", 8, 596)):  # fmt: skip
        samples = make_samples(count, mean, 0.1, 2)
        step = Ours(ours, samples, torch.randn(count, 3, 224, 224), shape.capacity)
        cpu_seconds(step.loss, ours)
        seconds = statistics.median(cpu_seconds(step.loss, ours) for _ in range(3))
        before = before or seconds
        print(f"{name:32}{seconds:9.2f}{seconds / before:8.2f}x")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default="tiny,smollm2")
    parser.add_argument("--products", default="torch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    worst = 0.0
    for products in arguments.products.split(","):
        worst = max(worst, table(arguments.models.split(","), arguments.rounds, products))
    print(f"largest difference of loss and gradients: {worst:.1e} (limit 1e-05)")
    if "tiny" in arguments.models:
        growth(SHAPES["tiny"])
    return 0 if worst <= 1e-5 else 1


def table(models: list[str], most: int, products: Products) -> float:
    """Print the rows of these models; return the largest difference of losses and gradients."""
    print(f"{machine()}, torch {torch.__version__}; products by {products}, one thread's: "
          f"{product_rate(products) / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(f"{'samples/s':32}{'ours':>9}{'peer':>9}{'ratio':>8}{'limit':>8}{'share':>8}"
          f"  (of which at least {SHARE})")  # fmt: skip
    worst = 0.0
    for name in models:
        rounds = most if name == "tiny" else min(3, most)
        worst = max(worst, measure(name, SHAPES[name], rounds, products))
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
