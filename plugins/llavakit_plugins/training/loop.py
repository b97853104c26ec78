"""The training loop: optimisation steps over micro-batches of the packed stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from llavakit import (
    LlavaModel,
    PackedBatch,
    PromptTemplate,
    Run,
    Sample,
    Stopped,
    TrainingError,
    and_more,
)
from llavakit_plugins.huggingface.unread import Unread
from llavakit_plugins.training import heap
from llavakit_plugins.training.callbacks import Callbacks
from llavakit_plugins.training.checkpoints import Best, Checkpoints
from llavakit_plugins.training.compiling import compiled
from llavakit_plugins.training.corpus import Batch, Corpus
from llavakit_plugins.training.division import parts_of_weights
from llavakit_plugins.training.feature_cache import Kept
from llavakit_plugins.training.features import Cached, features_of
from llavakit_plugins.training.initial import start_with
from llavakit_plugins.training.measure import Measure, entry_of
from llavakit_plugins.training.optimiser import Rates, Updates
from llavakit_plugins.training.options import TrainOptions
from llavakit_plugins.training.parallel import (
    answering,
    begin_sharded,
    drop_zeros,
    no_images,
    shard,
    sum_gradients,
)
from llavakit_plugins.training.parts import Parts
from llavakit_plugins.training.progress import Meter, Progress
from llavakit_plugins.training.sharded_checkpoints import ShardedCheckpoints, read_shares
from llavakit_plugins.training.sharing import Learned, Sharing, shared
from llavakit_plugins.training.taken import Due, Order, Taken, reseed
from llavakit_plugins.training.validation import Look, Validation, tell
from llavakit_plugins.training.watch import Watch

_NAMED = 5
_Micro = tuple[PackedBatch, Tensor | None]


class Trainer:
    """Trains a model in place; `run` gives the folder, the seed and the events.

    `held_out` is used for validation only, with the prompts of `template`. The model's weights that
    are `unread` are read where they are divided.
    """

    def __init__(
        self,
        model: LlavaModel,
        corpus: Corpus,
        options: TrainOptions,
        run: Run,
        held_out: Corpus | None = None,
        template: PromptTemplate | None = None,
        unread: Unread | None = None,
    ) -> None:
        self.model, self.corpus, self.options, self.run = model, corpus, options, run
        self.process_group = run.process_group
        parts = parts_of_weights(model, options, self.process_group.size)
        self.sharded = parts > 1
        self.encoder = "vision" in options.train
        if self.sharded:  # first: in float32 the whole weights might not fit into one device
            half = options.precision == "bf16"
            how: dict[str, Any] = {"half": half, "encoder": self.encoder, "unread": unread}
            shard(model, self.process_group, run.device, parts, **how)
        self.parts = Parts(model, options, remember=not self.sharded)
        entry = entry_of(model, sharded=self.sharded)
        if self.sharded:
            begin_sharded(model)
        self.measure = Measure(model, entry, run.build(options.objective), corpus)
        per_epoch = corpus.steps(options.batch_size)
        whole = per_epoch * options.epochs
        self.steps = min(whole, options.max_steps or whole)
        self.order = Order(corpus, options, run, model.device, self.steps)
        self.optimiser = Updates(
            self.parts.groups(),
            Rates(run.build(options.schedule), self.steps, options.warmup),
            optimiser=run.build(options.optimiser),
            clip=options.clip,
        )
        self.sharing = Sharing(self.optimiser.named.values())
        self.checkpoints = Checkpoints(run.directory / "checkpoints", options.keep)
        self.shards: ShardedCheckpoints | None = None
        if self.sharded:
            self.shards = ShardedCheckpoints(self.checkpoints, self.process_group)
        self.best = Best(run.directory / "checkpoints")
        self.progress = Progress()
        self._unread: list[Taken] = []
        self.watch = Watch(self.process_group, options.timeout)
        self.callbacks = Callbacks(model, run, self.steps, options.callbacks)
        self.features = features_of(corpus, model, options, run)
        self._references = [(self.measure, self.features, "reference")]
        self.cached = isinstance(self.features, Cached | Kept)
        self.meter = Meter(self.progress, model, options, cached=self.cached)
        self.validation: Validation | None = None
        if held_out is not None:
            found = features_of(held_out, model, options, run)
            held_out_measure = Measure(model, entry, self.measure.objective, held_out)
            self._references.append((held_out_measure, found, "held-out-reference"))
            self.validation = Validation(
                model,
                held_out,
                found,
                template or model.template,
                capacity=options.micro_batch_tokens,
                alive=lambda: self.watch.beat(self.progress.step),
                samples=options.samples if options.validate_every else 0,
                answering=partial(answering, model, self.process_group)
                if self.sharded
                else nullcontext,
                measure=held_out_measure,
            )
        self.questioned: Sequence[Sample] = self.validation.samples if self.validation else ()
        """Held-out samples whose first question is answered at each validation."""

    def train(self) -> Progress:
        """Train to the last step; with `run.resume`, go on from the newest checkpoint.

        Afterwards `model` is the whole trained model; with several processes only in the main one.
        Raises Stopped, after saving, if the user asked to stop, and TrainingError, which names the
        samples, if a loss is not finite.
        """
        if self.model.device.type == "cpu":
            heap.settle()
        with self.watch, self._saved(), compiled(self.model, self.options, cached=self.cached):
            self._train()
        if self.sharded:
            self._gather()
        else:
            self.parts.tear_down()
        return self.progress

    def _train(self) -> None:
        self._refer()  # before weights of a checkpoint are read
        if self.run.resume:
            self._restore()
        if self.options.validate_every and not self.progress.looks:
            self._look()
        self.callbacks.begin(self.progress.step)
        self.meter.restart(self.progress)
        note = ""
        with (
            shared(self.sharing, self.order.shares, self._help) as self.sharing,
            self._ready(self.sharing.own) as (due, found),
        ):
            for step in due:
                rate = self._step(step, found)
                progress = self.progress
                self.callbacks.on_step(progress.step)
                last = progress.step == self.steps
                logs = progress.step % self.options.log_every == 0 or last
                looks = last or progress.step % (self.options.validate_every or self.steps) == 0
                if logs or looks:
                    loss, norm = self._read()
                    note = f"loss {loss:.3f}"
                if logs:
                    self.run.event(
                        "train",
                        at=progress.step,
                        loss=round(loss, 6),
                        lr=rate,
                        lrs=dict(zip(self.options.train, self.optimiser.rates, strict=True)),
                        grad_norm=round(norm, 6),
                        epoch=progress.epoch,
                        **{name: round(told[-1][1], 6) for name, told in progress.figures.items()},
                        **self.meter.rates(progress),
                    )
                self.run.progress(progress.step, self.steps, note)
                if looks:
                    self._look()
                    self.meter.restart(progress)  # the speed must not count the time of validation
                stopping = self.run.stopping()
                if stopping or last or progress.step % self.options.checkpoint_every == 0:
                    self._save()
                if stopping and not last:
                    raise Stopped

    @contextmanager
    def _saved(self) -> Iterator[None]:
        """Wait at the end for the checkpoint that is being written."""
        try:
            yield
        finally:
            if self.shards is not None:
                self.shards.finish()

    @contextmanager
    def _ready(self, shares: Sequence[int]) -> Iterator[tuple[Iterator[Due], Iterator[_Micro]]]:
        """Yield the remaining steps, and the micro-batches of these shares of them."""
        # One iterator of steps, read twice: by the caller, and ahead of it by the image readers.
        due, ahead = tee(self.order.due(self.progress, shares))
        micros = (
            micro.samples for step in ahead for micros in step.micros.values() for micro in micros
        )
        with closing(self.features.load(micros)) as found:
            yield due, found

    def _help(self, share: int) -> Iterator[Learned]:
        """Yield what comes of a share of each remaining step, in a fork: see `shared`."""
        with self._ready([share]) as (due, found):
            for step in due:
                yield from self._learn(step, found)
                self.progress.step += 1

    def _learn(self, due: Due, found: Iterator[_Micro]) -> Iterator[Learned]:
        """Compute the gradients of this process's shares of a step, on the next micro-batches of
        `found`; yield what each came to."""
        weight = self.measure.weight(due.batch.all_samples)
        for share, micros in due.micros.items():
            reseed(self.run.seed, self.progress.step, self.process_group.rank + share)
            sums = torch.zeros(1 + len(self.measure.objective.figures), device=self.model.device)
            flop = 0.0
            # Nested autocast regions share the cache of rounded weights until the outermost one
            # ends: so weights are cast to bfloat16 once per step and not once per micro-batch.
            with self._autocast(enabled=False):
                for micro in micros:
                    self.watch.beat(self.progress.step + 1, "reading samples")
                    packed, features = next(found)
                    self.watch.beat(self.progress.step + 1)
                    if features is None and self.sharded:
                        features = no_images(self.model, encoder=self.encoder)
                    with self._autocast():
                        loss, figures = self.measure(packed, features)
                        loss = loss / weight * float(micro.counts)
                    if loss.requires_grad:  # not of a text alone, where nothing learns from it
                        loss.backward()
                    sums[0] += loss.detach()
                    sums[1:] += figures / weight * float(micro.counts)
                    if micro.counts:
                        flop += self.meter.work(packed, 0 if features is None else len(features))
            yield Learned(sums, flop)

    def _step(self, due: Due, found: Iterator[_Micro]) -> float:
        """Run one optimisation step on the next micro-batches of `found`; return its learning rate.

        Nothing here waits for the device: `_read` reads loss and norm later.
        """
        batch = due.batch
        sums, flop = self.sharing.add(self._learn(due, found))
        self.meter.add(flop)
        self.process_group.sum(sums)
        sum_gradients(self.optimiser.named.values(), self.process_group)
        if self.process_group.size > 1:
            drop_zeros(self.model, any(map(self.corpus.images.uses, batch.all_samples)))
        norm, rate = self.optimiser.step(self.progress.step, sums[0])
        self.progress.step += 1
        self.progress.epoch, self.progress.batch = due.epoch, due.number
        self.progress.samples += len(batch.all_samples)
        self.progress.tokens += sum(self.corpus.lengths_of(batch.all_samples))
        self.progress.targets += self.corpus.supervised_of(batch.all_samples)
        values = torch.cat((sums[:1], norm[None], sums[1:]))
        self._unread.append(Taken(self.progress.step, batch, values))
        return rate

    def _read(self) -> tuple[float, float]:
        """Wait for all steps that are not read yet; return loss and gradient norm of the last.

        Raises TrainingError for the first step where one of them is not finite. From that step on
        the optimiser has not changed any weight.
        """
        values = torch.stack([taken.values for taken in self._unread]).tolist()
        for taken, (loss, norm, *told) in zip(self._unread, values, strict=True):
            if not math.isfinite(loss):
                what = f"the loss of step {taken.step} is {loss}"
                raise TrainingError(self._blame(taken.batch, what))
            if not math.isfinite(norm):
                what = f"the gradient of step {taken.step} is not finite"
                raise TrainingError(self._blame(taken.batch, what))
            self.progress.losses.append((taken.step, loss))
            for name, value in zip(self.measure.objective.figures, told, strict=True):
                self.progress.figures.setdefault(name, []).append((taken.step, value))
        self._unread.clear()
        return loss, norm

    def _blame(self, batch: Batch, what: str) -> str:
        """Name the samples of a step with a loss that is not finite; weights are as before it."""
        bad = []
        with torch.no_grad(), self._autocast():
            for packed, features in self.features.load(self.corpus.groups(batch.all_samples)):
                if not torch.isfinite(self.measure(packed, features)[0]):
                    bad.append(packed.samples[0])
        names = and_more(bad or batch.all_samples, _NAMED, lambda one: f"`{self.corpus.name(one)}`")
        return (
            f"{what}; samples: {names}. Lower the learning rate, or look at these samples; "
            "--resume goes on from the last checkpoint"
        )

    def _refer(self) -> None:
        """Let the objective know what the model was before training, where it asks for that."""
        empty = partial(no_images, self.model, encoder=self.encoder) if self.sharded else None
        alive, capacity = partial(self.watch.beat, 0), self.options.micro_batch_tokens
        with self._undisturbed():
            for measure, features, name in self._references:
                measure.refer(self.run, features, name, capacity, empty, alive)

    def _look(self) -> None:
        """Validate, and save the trained weights if their held-out loss is the lowest so far."""
        if self.validation is None:
            return
        with self._undisturbed(), self.sharing.resting():
            look = self.process_group.broadcast(self.validation.look(self.progress.step))
        self.progress.looks.append((look.step, look.loss, look.answers))
        best = self.progress.best is not None and self.progress.best.step == look.step
        self.run.event(
            "validation",
            at=look.step,
            held_out_loss=round(look.loss, 6),
            best=best,
            answers=tell(self.questioned, look.answers),
        )
        if best and self.options.validate_every:
            weights = self._trained()
            self.best.save(look.step, weights, main=self.process_group.is_main)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Put the model into evaluation mode without gradients; restore its modes afterwards."""
        with torch.no_grad(), self._autocast():
            self.model.eval()
            try:
                yield
            finally:
                self.parts.learn()

    @torch.no_grad()
    def recall_best(self) -> Look | None:
        """Restore the trained weights of the best validation; return it, or None if none was kept.

        Call it after `train`, and with several processes only in the main one.
        """
        best = self.progress.best
        if best is None or not self.options.validate_every:
            return None
        self.best.drop_all_but(best.step)  # a killed attempt may have left others
        for name, weight in self.best.recall(best.step).items():
            parameter = self.model.get_parameter(name)
            parameter.data = weight.to(parameter.device, parameter.dtype)  # mapped, if need be
        return best

    def _autocast(self, enabled: bool = True) -> AbstractContextManager[Any]:
        if self.options.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _save(self) -> None:
        if self._unread:  # never save a step before its loss is known to be finite
            self._read()
        tensors, step = self.optimiser.tensors(), self.progress.step
        best = self.progress.best

        def drop_others() -> None:
            # only now: until the new checkpoint exists, a resume would need the earlier best
            if best is not None:
                self.best.drop_all_but(best.step)

        if self.shards is not None:
            self.shards.save(step, tensors, vars(self.progress), drop_others)
        elif self.process_group.is_main:
            self.checkpoints.save(step, tensors, vars(self.progress))
            drop_others()

    def _restore(self) -> None:
        found = self.checkpoints.load(Progress, partial(read_shares, place=self.optimiser.place))
        if found is not None:
            tensors, self.progress = found
            self.optimiser.restore(tensors)
            self.run.event("resumed", at=self.progress.step)

    def _trained(self) -> dict[str, Tensor]:
        """Return the trained weights, divided or not, in the precision that they will have."""
        return {
            name: self.parts.as_before(name, weight.detach())
            for name, weight in self.optimiser.named.items()
        }

    def _gather(self) -> None:
        """Make the main process's model the whole trained one, its weights mapped from a file."""
        made = start_with(self.run, self.options, self._trained())
        del self.model, self.parts, self.features, self.optimiser, self.measure, self._references
        self.validation = None
        if made is not None:
            self.model = made
