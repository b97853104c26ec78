"""Validation while a model trains: the loss on held-out samples, and answers to a few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llavakit import LlavaModel, PromptTemplate, Sample
from llavakit.contracts.data import IMAGE
from llavakit.contracts.model import Sampling
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.features import Features
from llavakit_plugins.training.measure import Measure

_NEW_TOKENS = 64  # of an answer: enough for a reader to see whether the model makes sense


@dataclass(frozen=True)
class Look:
    """The result of one validation."""

    step: int
    loss: float
    """Mean loss of a supervised token, in nats."""
    answers: Sequence[str] = ()
    """One answer for each of the validation's `samples`."""


def tell(samples: Sequence[Sample], answers: Sequence[str]) -> list[dict[str, str | None]]:
    """Return what an event says of the answers to the first questions of these samples."""
    return [
        {
            "id": sample.id,
            "question": sample.turns[0].text.replace(IMAGE, "").strip(),
            "answer": answer,
            "truth": sample.turns[1].text if len(sample.turns) > 1 else None,
            "image": _path(sample),
        }
        for sample, answer in zip(samples, answers, strict=True)
    ]


def _path(sample: Sample) -> str | None:
    first = sample.images[0] if sample.images else None
    return str(first) if isinstance(first, str | Path) else None


class Validation:
    """Measures the held-out loss and answers the first question of a few held-out samples.

    These `samples` are spread evenly over the whole set. Questions are written with `template`, the
    prompt template that the step trains with. `capacity` is the size of a micro-batch in rows. The
    model answers within `answering()`; `alive` is called on the way.
    """

    def __init__(
        self,
        model: LlavaModel,
        corpus: Corpus,
        features: Features,
        template: PromptTemplate,
        *,
        capacity: int,
        samples: int,
        alive: Callable[[], None] = lambda: None,
        answering: Callable[[], AbstractContextManager[object]] = nullcontext,
        measure: Measure | None = None,
    ) -> None:
        self._model, self._corpus, self._features = model, corpus, features
        self._template, self._capacity = template, capacity
        self._answering, self._alive, self._measure = answering, alive, measure
        groups, step = len(corpus) // corpus.together, corpus.together
        count = min(samples, groups)
        indices = (int(corpus.samples[n * groups // count * step]) for n in range(count))
        self.samples: list[Sample] = [corpus.data[index] for index in indices]

    def look(self, step: int) -> Look:
        """Return loss and answers at `step`. The model must be in evaluation mode."""
        loss = held_out_loss(
            self._model, self._corpus, self._capacity, self._features, self._alive, self._measure
        )
        self._alive()
        return Look(step, loss, self._ask())

    def _ask(self) -> list[str]:
        if not self.samples:
            return []
        # the model keeps the template it will be used with
        own, self._model.template = self._model.template, self._template
        try:
            questions = [(sample.turns[0].text, sample.images) for sample in self.samples]
            with self._answering():
                return self._model.answer(questions, Sampling(_NEW_TOKENS))
        finally:
            self._model.template = own


def held_out_loss(
    model: LlavaModel,
    corpus: Corpus,
    capacity: int,
    features: Features,
    alive: Callable[[], None] = lambda: None,
    measure: Measure | None = None,
) -> float:
    """Return the mean loss over a corpus without gradients: of a supervised token, in nats, or of
    what `measure` measures.

    `alive` is called for each micro-batch.
    """
    # the sum stays on the device and is read once, at the end: one wait for all micro-batches
    total, targets = torch.zeros((), device=model.device), 0
    micros: Sequence[Sequence[int]] = corpus.batch(list(corpus.samples), capacity).samples
    for loss, count in micro_losses(model, micros, features, measure):
        alive()
        total += loss
        targets += count
    return float(total) / targets


@torch.no_grad()
def micro_losses(
    model: LlavaModel,
    micros: Iterable[Sequence[int]],
    features: Features,
    measure: Measure | None = None,
) -> Iterator[tuple[Tensor, int]]:
    """Yield the summed loss of each micro-batch, float32 `[]`, and what it is divided by.

    `micros` holds the samples of each, of the corpus that `features` loads.
    """
    for packed, found in features.load(micros):
        if measure is None:
            yield model.loss(packed, found), len(packed.targets_M)
        else:
            yield measure(packed, found)[0], measure.weight(packed.samples)
