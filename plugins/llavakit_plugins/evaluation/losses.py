"""Measures the loss of held-out data, micro-batch by micro-batch; processes share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np

from llavakit import LlavaModel
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.features import Encoding
from llavakit_plugins.training.forked import forked
from llavakit_plugins.training.validation import micro_losses

_ROWS = 8192  # of a micro-batch: no gradients are kept, so that these need little memory


def held_out_losses(model: LlavaModel, corpora: Sequence[Corpus], shares: int) -> list[float]:
    """Return the mean loss of a supervised token of each corpus, in nats.

    Forks of this process measure so many `shares` of all micro-batches; which these are, and in
    which order their losses are added, does not depend on it.
    """
    dtype = next(model.vision.parameters()).dtype
    features = [Encoding(one, model, workers=0, dtype=dtype, learns=False) for one in corpora]
    micros = [
        (number, samples)
        for number, corpus in enumerate(corpora)
        for samples in corpus.batch(list(corpus.samples), _ROWS).samples
    ]

    shares = min(shares, max(1, len(micros)))

    def share(first: int) -> Iterator[tuple[int, float, int]]:
        for index in range(first, len(micros), shares):
            number, samples = micros[index]
            for loss, targets in micro_losses(model, [samples], features[number]):
                yield index, float(loss), targets

    with closing(forked(shares, share, "measured losses")) as found:
        measured = sorted(found)
    totals, targets = np.zeros(len(corpora), np.float32), [0] * len(corpora)
    for index, loss, count in measured:
        number = micros[index][0]
        totals[number] += np.float32(loss)
        targets[number] += count
    return [float(total) / count for total, count in zip(totals, targets, strict=True)]
