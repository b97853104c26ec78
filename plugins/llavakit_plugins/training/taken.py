"""Steps of training: those to be taken, and those whose loss is still on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llavakit import Run
from llavakit_plugins.training.corpus import Batch, Corpus
from llavakit_plugins.training.forked import shares_on
from llavakit_plugins.training.options import TrainOptions
from llavakit_plugins.training.parallel import Micro, own_micros
from llavakit_plugins.training.progress import Progress


class Taken(NamedTuple):
    """A finished step whose loss and norm have not been read from the device yet."""

    step: int
    batch: Batch
    values: Tensor
    """Mean loss, gradient norm, and what the objective reports, `[2 + F]`."""


class Due(NamedTuple):
    """A step to be taken."""

    epoch: int
    number: int
    """Number of the step within the epoch, from 1."""
    batch: Batch
    micros: Mapping[int, Sequence[Micro]]
    """The micro-batches of this device, by the share of the step that they are."""


class Order:
    """The steps of a training, in the order that the seed decides, and how each is divided."""

    def __init__(
        self, corpus: Corpus, options: TrainOptions, run: Run, device: torch.device, steps: int
    ) -> None:
        self._corpus, self._options, self._steps = corpus, options, steps
        self._seed, self._process_group = run.seed, run.process_group
        self.shares = shares_on(device, run.process_group, options.processes)
        """Shares of a step that processes of this device may compute beside each other."""

    def due(self, progress: Progress, shares: Sequence[int]) -> Iterator[Due]:
        """Yield the remaining steps, with the micro-batches of these shares.

        Image readers run ahead of training, so it keeps counters of its own, apart from `progress`.
        """
        options, done = self._options, progress.step
        epoch, before = progress.epoch, progress.batch
        while done < self._steps:
            batches = self._corpus.epoch(
                self._seed, epoch, options.batch_size, options.micro_batch_tokens, before
            )
            for batch in islice(batches, self._steps - done):
                before, done = before + 1, done + 1
                yield Due(epoch, before, batch, {n: self._micros(batch, n) for n in shares})
            epoch, before = epoch + 1, 0

    def _micros(self, batch: Batch, share: int) -> list[Micro]:
        group = self._process_group
        if group.size == self.shares == 1:
            return [Micro(samples, counts=True) for samples in batch.samples]
        capacity, samples = self._options.micro_batch_tokens, sorted(batch.all_samples)
        if group.size > 1:
            return own_micros(self._corpus, samples, capacity, group.rank, group.size)
        # no fillers: a share waits for no other within a micro-batch
        micros = own_micros(self._corpus, samples, capacity, share, self.shares)
        return [micro for micro in micros if micro.counts]


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed the random numbers of a step, such as dropout, by seed, step and rank alone.

    So a resumed run draws what an uninterrupted one draws, and each device drops other units.
    """
    key = np.random.SeedSequence([seed, step, rank])
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
