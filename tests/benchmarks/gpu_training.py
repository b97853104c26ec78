"""One optimisation step with random weights: ours, packed, beside transformers' LLaVA.

Sections of gpu.py: stage 1 of a 13B and stage 2 of a 7B at 224 pixels, parts of them, and a small
model. Both models share every weight, so that their losses can be compared, and see the same
samples.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tests.benchmarks.gpu_session import DEVICE, DRY, Session, device_memory, profiled, release
from tests.benchmarks.train_cpu import make_samples
from tests.core.peer import IMAGE_TOKEN, Bare
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit import LlavaModel
from llavakit.stream.batch import PackedBatch, pack
from llavakit.stream.encode import Encoded
from llavakit_plugins.connectors.mlp import Mlp, MlpOptions
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions
from llavakit_plugins.training import compiling
from llavakit_plugins.training.best_fit import best_fit
from llavakit_plugins.training.kinds import Group
from llavakit_plugins.training.optimiser import Updates
from llavakit_plugins.training.work import work_of
from llavakit_plugins.vision.clip import Clip, ClipOptions

LARGE = device_memory() > 1.3e11  # an H200
SAME = 0.02
"""How far the losses of two ways may lie apart: of as many layers in bfloat16."""
_COMPILING = 45  # seconds that must be left where blocks are compiled


@dataclass(frozen=True)
class Case:
    """A stage of a model, with lengths like those of the paper's data."""

    name: str
    language: dict[str, Any]
    vision: dict[str, Any]
    learns: bool
    """Whether the language model learns, beside the connector."""
    batch: int
    rows: tuple[int, int, int, int]
    """Most rows of a micro-batch, of ours and theirs, then where activations are recomputed; one
    that does not fit is tried with fewer."""
    text: float
    """Mean text tokens of a sample, beside its image."""
    spread: float
    weights: torch.dtype
    """Of the language model; what learns is float32 in a real run."""
    share_goal: float = 0.0
    """Of the rate of large products, for work that is necessary."""
    goals: tuple[float, float] = (0.0, 0.0)
    """Ratio to the peer without and with checkpointing."""
    compiles: bool = False
    """Whether the step is measured with `compile = true`, too."""


CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
}  # fmt: skip
CLIP_B = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
}  # fmt: skip
LLAMA: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 2048}
WIDE = LLAMA | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
    "num_attention_heads": 40,
}  # fmt: skip
SEVEN = LLAMA | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32,
}  # fmt: skip
SMALL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 2048,
}  # fmt: skip
STAGE_1 = Case(
    "stage 1, 13B", WIDE, CLIP_L, False, 64,
    (18432, 9216, 18432, 18432) if LARGE else (6144, 6144, 18432, 18432), 22, 0.35, torch.bfloat16,
    0.60, (1.35, 1.8),
)  # fmt: skip
# Weights and moments of 7B in float32 fit a large device only: elsewhere all are bfloat16, which is
# no way to train, but takes the same time for all but the optimiser.
STAGE_2 = Case(
    "stage 2, 7B", SEVEN, CLIP_L, True, 16,
    (4096, 1024, 9216, 9216) if LARGE else (4096, 4096, 9216, 9216), 298, 0.55,
    torch.float32 if LARGE else torch.bfloat16, 0.60, (1.7, 2.2),
)  # fmt: skip
LAYERS_16 = replace(
    STAGE_2, name="stage 2, 16 layers of 7B", language=SEVEN | {"num_hidden_layers": 16},
    rows=(4096, 4096, 9216, 9216), weights=torch.float32, goals=(0.0, 0.0),
)  # fmt: skip
MODEL_135M = Case(
    "stage 2, 135M",
    SMALL,
    CLIP_B,
    True,
    64,
    (36864, 18432, 36864, 36864),
    298,
    0.55,
    torch.float32,
    0.0,
    (2.5, 0.0),
    compiles=True,
)
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
    Case(name, TINY_LANGUAGE, TINY_VISION, learns, 4, (96, 96, 288, 288), 22, 0.35, torch.float32)
    for name, learns in (("stage 1, tiny", False), ("stage 2, tiny", True))
)


def stage1(session: Session) -> None:
    measure(session, "stage1", TINY[0] if DRY else STAGE_1)


def stage2(session: Session) -> None:
    measure(session, "stage2", TINY[1] if DRY else STAGE_2)


def layers16(session: Session) -> None:
    measure(session, "layers16", TINY[1] if DRY else LAYERS_16)


def small(session: Session) -> None:
    """Where the host launches kernels more slowly than the device runs them."""
    measure(session, "small", replace(TINY[1], compiles=True) if DRY else MODEL_135M)


def smoke(session: Session) -> None:
    """Both stages of 2 layers at the width of a 13B: that they run, and that losses agree."""
    two = WIDE | {"num_hidden_layers": 2}
    cases = [
        replace(STAGE_1, name="stage 1, 2 layers", language=two, batch=32, rows=(4096,) * 4),
        replace(
            STAGE_2, name="stage 2, 2 layers", language=two, batch=8, rows=(2048,) * 4,
            weights=torch.float32,
        ),
    ]  # fmt: skip
    for case in TINY if DRY else cases:
        measure(session, "smoke", replace(case, share_goal=0.0, goals=(0.0, 0.0)))
        release()


def profile(session: Session) -> None:
    """Where the time of a step goes: of the small model, and of 2 layers of a large one."""
    two = replace(STAGE_2, language=SEVEN | {"num_hidden_layers": 2}, weights=torch.float32)
    for case in TINY[1:] if DRY else (MODEL_135M, replace(two, name="stage 2, 2 layers of 7B")):
        if not session.time_for(case.name, 0 if DRY else 10):
            return
        _, ours = make_pair(case)
        way = Packed(ours, *_data(case, ours), case, case.rows[0])
        step = _stepper(way, case)
        for number in range(2):
            step(number)
        _wait()
        begun = time.perf_counter()
        step(2)
        _wait()
        seconds = time.perf_counter() - begun
        found = profiled(partial(step, 3))
        for name, taken, calls in found.kernels[:12]:
            session.row(
                "profile", case=case.name, kernel=name[:90], ms=taken * 1e3, calls=calls,
                share=taken / max(found.busy, 1e-9),
            )  # fmt: skip
        session.say(
            f"profile {case.name}: a step {seconds * 1e3:.1f} ms, device busy "
            f"{found.busy * 1e3:.1f} ms, {found.launches} launches, most: "
            f"{found.kernels[0][0][:60]}"
        )
        session.text("profile.txt", f"{case.name}\n{found.table}")
        del ours, way, step, found
        release()


def _wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


def _data(case: Case, ours: LlavaModel) -> tuple[list[Encoded], Tensor]:
    samples = make_samples(case.batch, case.text, case.spread, seed=1)
    edge = case.vision["image_size"]
    dtype = next(ours.vision.parameters()).dtype
    return samples, torch.randn(case.batch, 3, edge, edge, device=DEVICE).to(dtype)


def measure(session: Session, section: str, case: Case) -> None:
    """Time every way; one that does not fit is tried with fewer rows."""
    theirs, ours = make_pair(case)
    samples, pixels = _data(case, ours)
    lengths = [sample.length(ours.visual_tokens) for sample in samples]

    def packed(rows: int) -> Packed:
        return Packed(ours, samples, pixels, case, rows)

    def padded(rows: int) -> Padded:
        return Padded(theirs, samples, pixels, case, rows)

    def compiled(rows: int) -> Packed:
        return Packed(ours, samples, pixels, case, rows, compiles=True)

    ways: dict[str, tuple[Callable[[int], Packed | Padded], bool, int]] = {
        "ours": (packed, False, case.rows[0]),
        "transformers": (padded, False, case.rows[1]),
        "ours, recomputing": (packed, True, case.rows[2]),
        "transformers, checkpointing": (padded, True, case.rows[3]),
    }
    if case.compiles:
        ways["ours, compiled"] = (compiled, False, case.rows[0])
    rates: dict[str, float] = {}
    shares: dict[str, float] = {}
    expected: float | None = None
    for name, (make, recompute, most) in ways.items():
        needed = _COMPILING if name == "ours, compiled" else 8
        if not session.time_for(f"{case.name}, {name}", 0 if DRY else needed):
            continue
        for rows in (most, most // 2, most // 4):
            way = make(rows)
            way.recompute(recompute)
            found = None
            try:
                with way.blocks():
                    found = _time(way, case)
            except torch.OutOfMemoryError:
                print(f"{case.name}, {name}: {rows} rows do not fit", flush=True)
            finally:
                way.model.zero_grad(set_to_none=True)  # what it had got, or did not use
                release()
            if found is None:
                continue
            seconds, loss, peak = found
            expected = loss if expected is None else expected
            if name == "ours":
                targets = [int(sample.supervised[1:].sum()) for sample in samples]
                train = ("connector", "language") if case.learns else ("connector",)
                work = work_of(ours, train).of(
                    case.batch, case.batch * ours.visual_tokens, lengths, sum(targets)
                )
            rates[name] = case.batch / seconds
            shares[name] = work / seconds / session.flops
            session.row(
                section,
                case=case.name,
                way=name,
                attention=way.attention,
                weights=str(case.weights).removeprefix("torch."),
                micro_rows=rows,
                samples_per_s=rates[name],
                tokens_per_s=sum(lengths) / seconds,
                of_limit=shares[name],
                peak_GB=peak,
                error=abs(loss - expected) / abs(expected),
                limit=1e-5 if DRY else SAME,
            )
            session.say(
                f"{case.name}, {name}: {rates[name]:.4g} samples/s, {shares[name]:.3f} of the "
                f"matrix rate, {rows} rows, {peak:.0f} GB"
            )
            break
        else:
            session.say(f"{case.name}, {name}: does not fit this device")
        if "ours" not in rates:  # the work is counted with it
            break
    _compare(session, section, case, rates, shares)


def _compare(
    session: Session,
    section: str,
    case: Case,
    rates: dict[str, float],
    shares: dict[str, float],
) -> None:
    mine = max(rates, key=lambda name: rates[name] if name.startswith("ours") else 0.0, default="")
    if not mine:
        return
    if case.share_goal:
        share = shares[mine]
        session.goal(section, f"{mine}, share", case.share_goal, share, case=case.name)
    for name, wanted in zip(("transformers", "transformers, checkpointing"), case.goals):  # noqa: B905
        if name in rates and (wanted or DRY):
            ratio = rates[mine] / rates[name]
            session.goal(section, f"ours / {name}", wanted, ratio, case=case.name)


def make_pair(case: Case) -> tuple[Any, LlavaModel]:
    """Return (theirs, ours), which share every weight; the connector's are float32."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    flash = not DRY and importlib.util.find_spec("flash_attn") is not None
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
    half = torch.float32 if DRY else torch.bfloat16
    with DEVICE, _default(case.weights):
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


def _precision() -> AbstractContextManager[Any]:
    return nullcontext() if DRY else torch.autocast("cuda", torch.bfloat16)


class Packed:
    """Our step: micro-batches of the packed stream, of at most `rows` rows."""

    attention = "packed"

    def __init__(
        self,
        model: LlavaModel,
        samples: list[Encoded],
        pixels: Tensor,
        case: Case,
        rows: int,
        *,
        compiles: bool = False,
    ) -> None:
        self.model, self.pixels, self.case, self.compiles = model, pixels, case, compiles
        bins = best_fit([s.length(model.visual_tokens) for s in samples], rows)
        self.batches: list[PackedBatch] = [
            pack([samples[i] for i in items], items, model.visual_tokens).to(pixels.device)
            for items in bins
        ]
        self.targets = sum(len(batch.targets_M) for batch in self.batches)

    def recompute(self, on: bool) -> None:
        self.model.language.recompute = on

    @contextmanager
    def blocks(self) -> Iterator[None]:
        """Let blocks run as a recipe's `compile` says."""
        if not self.compiles:
            yield
            return
        if DRY:
            compiling.BACKEND = "eager"
        compiled = compiling.Compiled(self.model, encoder=True)
        try:
            yield
        finally:
            compiled.undo()

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

    def blocks(self) -> AbstractContextManager[None]:
        return nullcontext()

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


def _stepper(way: Packed | Padded, case: Case) -> Callable[[int], Tensor]:
    """Return what takes a step of that number and gives the loss, on the device."""
    # a rate of 0: the other ways shall see the same weights
    optimiser = Updates([Group(way.learning(), 0.0)], lambda step: 1.0)

    def step(number: int) -> Tensor:
        total = torch.zeros((), device=DEVICE)
        with _precision():
            for loss in way.losses():
                loss.backward()
                total += loss.detach()
        optimiser.step(number, total)
        return total

    return step


def _time(way: Packed | Padded, case: Case) -> tuple[float, float, float]:
    """Return seconds of a step, the loss before the first, and the peak of memory in GB."""
    steps = 1 if DRY else 2
    step = _stepper(way, case)
    if not DRY:
        torch.cuda.reset_peak_memory_stats()
    first = float(step(0))
    begun = time.perf_counter()
    for number in range(steps):
        last = step(number + 1)
    loss = float(last)  # waits for the device
    seconds = (time.perf_counter() - begun) / steps
    if not np.isclose(loss, first, rtol=1e-3):
        raise SystemExit(f"{case.name}: the loss went from {first} to {loss} at a rate of 0")
    peak = 0.0 if DRY else torch.cuda.max_memory_allocated() / 1e9
    return seconds, first, peak
