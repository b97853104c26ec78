"""One optimisation step at real size with random weights: ours, packed, beside transformers' LLaVA.

The training section of gpu.py. Stage 1 of a 13B and stage 2 of a 7B at 224 pixels; both models
share every weight, so that their losses can be compared, and see the same samples.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tests.benchmarks.train_cpu import make_samples
from tests.core.peer import IMAGE_TOKEN, Bare
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit import LlavaModel
from llavakit.stream.batch import PackedBatch, pack
from llavakit.stream.encode import Encoded
from llavakit_plugins.connectors.mlp import Mlp, MlpOptions
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions
from llavakit_plugins.training.best_fit import best_fit
from llavakit_plugins.training.kinds import Group
from llavakit_plugins.training.optimiser import Updates
from llavakit_plugins.vision.clip import Clip, ClipOptions


class Session(Protocol):
    """What gpu.py gives a section."""

    flops: float

    def left(self) -> float: ...

    def row(self, section: str, **values: Any) -> None: ...


@dataclass(frozen=True)
class Case:
    """A stage of a model, with lengths like those of the paper's data."""

    name: str
    language: dict[str, Any]
    vision: dict[str, Any]
    learns: bool
    """Whether the language model learns, beside the connector."""
    text: float
    """Mean text tokens of a sample, beside its image."""
    spread: float
    batch: int
    capacity: int
    """Rows of a micro-batch."""
    tflop: float
    """Necessary work of a sample at these lengths: no padding, no recomputation, no gradient that
    nothing learns from."""
    rate_goal: float
    goals: tuple[float, float]
    """Ratio to the peer without and with checkpointing."""


CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
}  # fmt: skip
LLAMA: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 2048}
CASES = (
    Case(
        "stage 1, 13B",
        LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                 "num_attention_heads": 40},
        CLIP_L, False, 22, 0.35, 128, 18432, 14.1, 30.0, (1.35, 1.8),
    ),
    Case(
        "stage 2, 7B",
        LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                 "num_attention_heads": 32},
        CLIP_L, True, 298, 0.55, 32, 4096, 21.7, 20.0, (1.7, 2.2),
    ),
)  # fmt: skip
TINY_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TINY_LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 128, "max_position_embeddings": 2048,
    "initializer_range": 0.5,  # a loss that tells weights apart
}  # fmt: skip
TINY = tuple(
    Case(name, TINY_LANGUAGE, TINY_VISION, learns, 22, 0.35, 4, 96, 1e-6, 0.0, (0.0, 0.0))
    for name, learns in (("stage 1, tiny", False), ("stage 2, tiny", True))
)


def training(session: Session, device: torch.device) -> None:
    """Time every way of every case; a CPU takes tiny ones, whose numbers mean nothing."""
    for case in TINY if device.type == "cpu" else CASES:
        if session.left() < 60 and device.type == "cuda":
            print(f"({case.name}: left out, {session.left():.0f} s are left)", flush=True)
            continue
        _measure(session, case, device)
        _release(device)


def _measure(session: Session, case: Case, device: torch.device) -> None:
    dtype = _weights_dtype(case, device)
    theirs, ours = make_pair(case, device, dtype)
    samples = make_samples(case.batch, case.text, case.spread, seed=1)
    edge = case.vision["image_size"]
    pixels = torch.randn(case.batch, 3, edge, edge, device=device).to(
        next(ours.vision.parameters()).dtype
    )
    tokens = sum(sample.length(ours.visual_tokens) for sample in samples)
    ways: dict[str, tuple[Callable[[int], Packed | Padded], bool]] = {
        "ours": (lambda rows: Packed(ours, samples, pixels, case, rows), False),
        "ours, recomputing": (lambda rows: Packed(ours, samples, pixels, case, rows), True),
        "transformers": (lambda rows: Padded(theirs, samples, pixels, case, rows), False),
        "transformers, checkpointing": (
            lambda rows: Padded(theirs, samples, pixels, case, rows), True,
        ),
    }  # fmt: skip
    rates: dict[str, float] = {}
    expected: float | None = None
    for name, (make, recompute) in ways.items():
        for rows in (case.capacity, case.capacity // 2, case.capacity // 4):
            _release(device)  # what the way before, or one that did not fit, has left
            way = make(rows)
            way.recompute(recompute)
            try:
                seconds, loss, peak = _time(way, case, device)
            except torch.OutOfMemoryError:
                continue
            expected = loss if expected is None else expected
            rates[name] = case.batch / seconds
            session.row(
                "training",
                case=case.name,
                way=name,
                attention=way.attention,
                weights=str(dtype).removeprefix("torch."),
                micro_rows=rows,
                samples_per_s=rates[name],
                tokens_per_s=tokens / seconds,
                of_limit=rates[name] * case.tflop * 1e12 / session.flops,
                peak_GB=peak,
                differs=abs(loss - expected) / abs(expected),
            )
            break
        else:
            session.row("training", case=case.name, way=name, outcome="does not fit this device")
    _compare(session, case, rates)


def _compare(session: Session, case: Case, rates: dict[str, float]) -> None:
    mine = rates.get("ours", rates.get("ours, recomputing"))
    if mine is None:
        return
    goals = {"samples/s": (mine, case.rate_goal)}
    for name, wanted in zip(("transformers", "transformers, checkpointing"), case.goals):  # noqa: B905
        if name in rates:
            goals[f"ours / {name}"] = (mine / rates[name], wanted)
    for goal, (measured, wanted) in goals.items():
        session.row("training: goals", case=case.name, goal=goal, wanted=wanted, measured=measured)


def _weights_dtype(case: Case, device: torch.device) -> torch.dtype:
    """Return the type of the language model's weights: float32 where it learns and that fits."""
    if device.type == "cpu":
        return torch.float32
    room = torch.cuda.get_device_properties(device).total_memory
    return torch.float32 if case.learns and room > 130e9 else torch.bfloat16


def make_pair(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Any, LlavaModel]:
    """Return (theirs, ours), which share every weight; the connector's are float32."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    options: dict[str, Any] = {"attn_implementation": attention}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**case.vision),
        text_config=LlamaConfig(**case.language),
        image_token_index=IMAGE_TOKEN,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **options,
    )
    half = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device, _default(dtype):
        theirs = LlavaForConditionalGeneration(config)
        llama = LlamaForCausalLM(LlamaConfig(**case.language))
        vision = Clip(ClipOptions(config=case.vision))
        connector = Mlp(
            MlpOptions(),
            vision_width=case.vision["hidden_size"],
            language_width=case.language["hidden_size"],
        )
    model, projector = theirs.model, theirs.model.multi_modal_projector
    model.vision_tower.to(half)
    projector.float()
    pairs = (
        (vision.inner, model.vision_tower),
        (llama.model, model.language_model),
        (llama.lm_head, theirs.lm_head),
        (connector.layers[0], projector.linear_1),
        (connector.layers[2], projector.linear_2),
    )
    for mine, yours in pairs:
        mine.load_state_dict(yours.state_dict(), assign=True)
    language = Vicuna(VicunaOptions(config=case.language), llama)
    return theirs, LlavaModel(vision, connector, language, Bare(), choices={})


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.autocast("cuda", torch.bfloat16)


class Packed:
    """Our step: micro-batches of the packed stream, of at most `rows` rows."""

    attention = "packed"

    def __init__(
        self, model: LlavaModel, samples: list[Encoded], pixels: Tensor, case: Case, rows: int
    ) -> None:
        self.model, self.pixels, self.case = model, pixels, case
        bins = best_fit([s.length(model.visual_tokens) for s in samples], rows)
        self.batches: list[PackedBatch] = [
            pack([samples[i] for i in items], items, model.visual_tokens).to(pixels.device)
            for items in bins
        ]
        self.targets = sum(len(batch.targets_M) for batch in self.batches)

    def recompute(self, on: bool) -> None:
        self.model.language.recompute = on

    def learning(self) -> dict[str, nn.Parameter]:
        self.model.requires_grad_(False)
        parts: list[nn.Module] = [self.model.connector]
        if self.case.learns:
            parts.append(self.model.language)
        return _thaw(parts)

    def losses(self) -> Iterator[Tensor]:
        for batch in self.batches:
            with torch.no_grad():
                features = self.model.features(self.pixels[[s for s, _ in batch.images]])
            yield self.model.loss(batch, features) / self.targets


class Padded:
    """transformers' step: padded batches in the samples' order, logits of every row."""

    def __init__(
        self, model: Any, samples: list[Encoded], pixels: Tensor, case: Case, rows: int
    ) -> None:
        self.model, self.case = model, case
        self.attention = str(model.config.text_config._attn_implementation)
        patches = (case.vision["image_size"] // case.vision["patch_size"]) ** 2
        whole = [sample.expand(patches) for sample in samples]
        self.targets = sum(int(row.supervised[1:].sum()) for row in whole)
        mean = sum(len(row.token_ids) for row in whole) / len(whole)
        size = max(1, round(rows / mean))
        self.batches = []
        for begin in range(0, len(whole), size):
            part = whole[begin : begin + size]
            longest = max(len(row.token_ids) for row in part)
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
            for number, row in enumerate(part):
                values = np.where(row.visual, IMAGE_TOKEN, row.token_ids)
                supervised = np.where(row.supervised, row.token_ids, -100)
                ids[number, : len(values)] = torch.from_numpy(values)
                labels[number, : len(values)] = torch.from_numpy(supervised)
                mask[number, : len(values)] = 1
            on_device = [tensor.to(pixels.device) for tensor in (ids, mask, labels)]
            self.batches.append((*on_device, pixels[begin : begin + size]))

    def recompute(self, on: bool) -> None:
        self.model.train()
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def learning(self) -> dict[str, nn.Parameter]:
        self.model.requires_grad_(False)
        parts = [self.model.model.multi_modal_projector]
        if self.case.learns:
            parts += [self.model.model.language_model, self.model.lm_head]
        return _thaw(parts)

    def losses(self) -> Iterator[Tensor]:
        for ids, mask, labels, pixels in self.batches:
            logits = self.model(
                input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False
            ).logits
            yield (
                F.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(),
                    labels[:, 1:].flatten(),
                    ignore_index=-100,
                    reduction="sum",
                )
                / self.targets
            )


def _thaw(parts: list[Any]) -> dict[str, nn.Parameter]:
    named: dict[str, nn.Parameter] = {}
    for number, part in enumerate(parts):
        part.requires_grad_(True)
        named |= {f"{number}.{name}": weight for name, weight in part.named_parameters()}
    return named


def _time(way: Packed | Padded, case: Case, device: torch.device) -> tuple[float, float, float]:
    """Return seconds of a step, the loss before the first, and the peak of memory in GB."""
    steps = 1 if device.type == "cpu" else 2
    # a rate of 0: the other ways shall see the same weights
    optimiser = Updates([Group(way.learning(), 0.0)], lambda step: 1.0)

    def step(number: int) -> Tensor:
        total = torch.zeros((), device=device)
        with _precision(device):
            for loss in way.losses():
                loss.backward()
                total += loss.detach()
        optimiser.step(number, total)
        return total

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = float(step(0))
    begun = time.perf_counter()
    for number in range(steps):
        last = step(number + 1)
    loss = float(last)  # waits for the device
    seconds = (time.perf_counter() - begun) / steps
    if not np.isclose(loss, first, rtol=1e-3):
        raise SystemExit(f"{case.name}: the loss went from {first} to {loss} at a rate of 0")
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return seconds, first, peak


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
