"""The training loop: optimisation steps over micro-batches of the packed stream."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llavakit import LlavaModel, Run, Stopped, TrainingError
from llavakit.assembly import cast_weights
from llavakit_plugins.training.checkpoints import Checkpoints
from llavakit_plugins.training.corpus import Batch, Corpus
from llavakit_plugins.training.features import (
    CACHE_BYTES,
    Cached,
    Encoding,
    Features,
    images_recur,
    preparation,
)
from llavakit_plugins.training.optimiser import Group, NotFinite, Optimiser, Schedule
from llavakit_plugins.training.options import TrainOptions
from llavakit_plugins.training.parallel import (
    Micro,
    in_one_piece,
    no_images,
    own_micros,
    shard,
    sum_gradients,
)

PARTS = ("vision", "connector", "language")
_NAMED = 5


@dataclass
class Progress:
    """How far a training step is; all that a checkpoint holds besides tensors."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Steps done within the epoch."""
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """Trains a model by its options; `run` decides folder, seed and how to report."""

    def __init__(self, model: LlavaModel, corpus: Corpus, options: TrainOptions, run: Run) -> None:
        self.model, self.corpus, self.options, self.run = model, corpus, options, run
        self.team = run.team
        self.sharded = self._sharded()
        if self.sharded:  # before the weights grow to float32
            shard(model, self.team, half=options.precision == "bf16")
        self._before = _set_up(model, options, remember=not self.sharded)
        per_epoch = corpus.steps(options.batch_size)
        whole = per_epoch * options.epochs
        self.steps = min(whole, options.max_steps or whole)
        self.optimiser = Optimiser(
            [
                _group(model, part, rate, options.weight_decay)
                for part, rate in options.train.items()
            ],
            Schedule(self.steps, options.warmup, options.schedule),
            betas=options.betas,
            clip=options.clip,
        )
        self.checkpoints = Checkpoints(run.directory / "checkpoints", options.keep)
        self.progress = Progress()
        self.features = self._features()

    def _sharded(self) -> bool:
        if self.team.size == 1 or self.options.shard is False:
            return False
        if "vision" not in self.options.train:
            return self.options.shard or "language" in self.options.train
        if self.options.shard:
            raise TrainingError(
                "an encoder that learns cannot be divided among devices; set shard = false"
            )
        return False

    def _features(self) -> Features:
        learns = "vision" in self.options.train
        dtype = next(self.model.vision.parameters()).dtype
        preparing = preparation(self.model, self.options.prepare, self.run.build)
        if not learns and self._worth_caching():
            return Cached(
                self.corpus,
                self.model,
                dtype=dtype,
                progress=self.run.progress,
                preparing=preparing,
            )
        return Encoding(
            self.corpus,
            self.model,
            workers=self.options.workers,
            dtype=dtype,
            learns=learns,
            preparing=preparing,
        )

    def _worth_caching(self) -> bool:
        if self.options.cache_features is not None:
            return self.options.cache_features
        vision = self.model.vision
        floats = vision.tokens(vision.image_size) * vision.width
        return images_recur(self.corpus, self.options.epochs, CACHE_BYTES // (4 * floats))

    def train(self) -> Progress:
        """Train to the end, from the newest checkpoint where `run.resume` says so.

        Afterwards `model` is the trained one, whole; of several processes only in the leader.
        Raises Stopped after saving, where the user asked to stop, and TrainingError naming the
        samples where the loss is not finite.
        """
        if self.run.resume:
            self._restore()
        meter = _Meter(self.progress)
        for batch in self._batches():
            loss, norm, rate = self._step(batch)
            progress = self.progress
            progress.step += 1
            progress.batch += 1
            progress.losses.append((progress.step, loss))
            last = progress.step == self.steps
            if progress.step % self.options.log_every == 0 or last:
                self.run.event(
                    "train",
                    at=progress.step,
                    loss=round(loss, 6),
                    lr=rate,
                    grad_norm=round(norm, 6),
                    epoch=progress.epoch,
                    **meter.rates(progress),
                )
            self.run.progress(progress.step, self.steps, f"loss {loss:.3f}")
            stopping = self.run.stopping()
            if stopping or last or progress.step % self.options.checkpoint_every == 0:
                self._save()
            if stopping and not last:
                raise Stopped
        self._tear_down()
        return self.progress

    def _batches(self) -> Iterator[Batch]:
        """Yield the steps that are left, in the order that the seed decides."""
        options, progress = self.options, self.progress
        while progress.step < self.steps:
            epoch = self.corpus.epoch(
                self.run.seed, progress.epoch, options.batch_size, options.micro_batch_tokens
            )
            for number, batch in enumerate(epoch):
                if number >= progress.batch and progress.step < self.steps:
                    yield batch
            if progress.step < self.steps:
                progress.epoch += 1
                progress.batch = 0

    def _step(self, batch: Batch) -> tuple[float, float, float]:
        """Return loss a target, gradient norm and learning rate of one optimisation step."""
        targets = sum(self.corpus.learned_counts[sample] for sample in batch.all_samples)
        total = torch.zeros((), device=self.model.device)
        micros = self._micros(batch)
        found = self.features.load([micro.samples for micro in micros])
        for micro, (packed, features) in zip(micros, found, strict=True):
            if features is None and self.sharded:
                features = no_images(self.model)
            with self._autocast():
                loss = self.model.loss(packed, features) / targets * float(micro.counts)
            loss.backward()
            total += loss.detach()
        value = self.team.sum(total).item()
        if not math.isfinite(value):
            raise TrainingError(
                self._blame(batch, f"the loss of step {self.progress.step + 1} is {value}")
            )
        sum_gradients(self.optimiser.named.values(), self.team)
        try:
            norm, rate = self.optimiser.step(self.progress.step)
        except NotFinite as error:
            what = f"the gradient of step {self.progress.step + 1} is not finite"
            raise TrainingError(self._blame(batch, what)) from error
        self.progress.samples += len(batch.all_samples)
        self.progress.tokens += sum(self.corpus.lengths[s] for s in batch.all_samples)
        self.progress.targets += targets
        return value, norm.item(), rate

    def _micros(self, batch: Batch) -> list[Micro]:
        """Return the micro-batches of this device."""
        if self.team.size == 1:
            return [Micro(samples, counts=True) for samples in batch.samples]
        capacity = self.options.micro_batch_tokens
        return own_micros(self.corpus, sorted(batch.all_samples), capacity, self.team)

    def _blame(self, batch: Batch, what: str) -> str:
        """Say which samples of a step have no finite loss: the weights are still those before."""
        bad = []
        with torch.no_grad(), self._autocast():
            for packed, features in self.features.load([(s,) for s in batch.all_samples]):
                if not torch.isfinite(self.model.loss(packed, features)):
                    bad.append(packed.samples[0])
        named = bad or batch.all_samples
        names = ", ".join(f"`{self.corpus.data[sample].id}`" for sample in named[:_NAMED])
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        return (
            f"{what}; samples: {names}{more}. Lower the learning rate, or look at these samples; "
            "--resume goes on from the last checkpoint"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.options.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)

    def _save(self) -> None:
        tensors = in_one_piece(self.optimiser.tensors(), self.team)
        if self.team.leads:
            self.checkpoints.save(self.progress.step, tensors, vars(self.progress))

    def _restore(self) -> None:
        found = self.checkpoints.load()
        if found is not None:
            tensors, state = found
            self.optimiser.restore(tensors)
            self.progress = Progress(**state)
            self.run.event("resumed", at=self.progress.step)

    def _tear_down(self) -> None:
        """Give every part its own precision back; one that was frozen, its own weights."""
        if self.sharded:
            self._gather()
            return
        for part, before in self._before.items():
            module = getattr(self.model, part)
            cast_weights(module, before.dtype)
            for name, weight in before.weights.items():
                module.get_parameter(name).data = weight.to(self.model.device)
        self.model.requires_grad_(False).eval()

    def _gather(self) -> None:
        """Put what was learned into a model that is not divided."""
        learned = in_one_piece({n: p.detach() for n, p in self.optimiser.named.items()}, self.team)
        del self.model, self.features, self.optimiser
        if self.team.leads:
            self.model = self.run.model(self.options.init)
            with torch.no_grad():
                for name, value in learned.items():
                    self.model.get_parameter(name).copy_(value)
            self.model.requires_grad_(False).eval()


@dataclass(frozen=True)
class _Before:
    """A part as it was before training."""

    dtype: torch.dtype
    weights: Mapping[str, Tensor]
    """Of a frozen part that is rounded to half precision meanwhile, its own, off the device."""


def _set_up(model: LlavaModel, options: TrainOptions, *, remember: bool) -> dict[str, _Before]:
    """Freeze and thaw; return what the parts were before, with weights that are rounded now."""
    befores = {}
    half = torch.bfloat16 if options.precision == "bf16" else torch.float32
    for part in PARTS:
        module = getattr(model, part)
        learns = part in options.train
        wanted = torch.float32 if learns else half
        dtype = next((p.dtype for p in module.parameters()), wanted)
        weights = {}
        if remember and not learns and dtype != wanted:
            weights = {name: p.detach().cpu() for name, p in module.named_parameters()}
        befores[part] = _Before(dtype, weights)
        module.requires_grad_(learns)
        module.train(learns)
        cast_weights(module, wanted)
    model.language.recompute = options.recompute
    return befores


def require_weights(part: str, count: int) -> None:
    """Raise TrainingError where a part that should learn has nothing to learn with."""
    if not count:
        raise TrainingError(f"`{part}` has no parameters that learn; take it out of `train`")


def _group(model: LlavaModel, part: str, rate: float, weight_decay: float) -> Group:
    named = {
        f"{part}.{name}": parameter
        for name, parameter in getattr(model, part).named_parameters()
        if parameter.requires_grad
    }
    require_weights(part, len(named))
    return Group(named, rate, weight_decay)


class _Meter:
    """Samples and tokens a second since the last look."""

    def __init__(self, progress: Progress) -> None:
        self._look(progress)

    def _look(self, progress: Progress) -> None:
        self._time, self._samples, self._tokens = (
            time.monotonic(),
            progress.samples,
            progress.tokens,
        )

    def rates(self, progress: Progress) -> dict[str, float]:
        seconds = max(time.monotonic() - self._time, 1e-9)
        samples = (progress.samples - self._samples) / seconds
        tokens = (progress.tokens - self._tokens) / seconds
        self._look(progress)
        return {"samples_per_s": round(samples, 2), "tokens_per_s": round(tokens)}


@torch.no_grad()
def held_out_loss(model: LlavaModel, corpus: Corpus, capacity: int, features: Features) -> float:
    """Return the mean loss a target token over a corpus, nothing learned."""
    total, targets = torch.zeros((), device=model.device), 0
    micros: Sequence[Sequence[int]] = corpus.batch(corpus.samples, capacity).samples
    for packed, found in features.load(micros):
        total += model.loss(packed, found)
        targets += len(packed.targets_M)
    return float(total) / targets
