"""Looks at held-out samples while a model trains: their loss, and what it answers to a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llavakit import LlavaModel, PromptTemplate, Sample
from llavakit.contracts.model import Sampling
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.features import Features

_NEW_TOKENS = 64  # of an answer: enough to see whether it learns to say something


@dataclass(frozen=True)
class Look:
    """What was seen at one step."""

    step: int
    loss: float
    answers: Sequence[str] = ()
    """One for each of the validation's samples."""


class Validation:
    """Held-out samples, and what to ask of them.

    A few samples, spread over the whole set, are asked their first question in the words of
    `template`, the one that the step trains on.
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
    ) -> None:
        self._model, self._corpus, self._features = model, corpus, features
        self._template, self._capacity = template, capacity
        count = min(samples, len(corpus))
        indices = (corpus.samples[number * len(corpus) // count] for number in range(count))
        self.samples: list[Sample] = [corpus.data[index] for index in indices]

    def look(self, step: int) -> Look:
        """Measure the loss and ask; the model must be in evaluation mode."""
        loss = held_out_loss(self._model, self._corpus, self._capacity, self._features)
        return Look(step, loss, self._ask())

    def _ask(self) -> list[str]:
        if not self.samples:
            return []
        own, self._model.template = self._model.template, self._template
        try:
            questions = [(sample.turns[0].text, sample.images) for sample in self.samples]
            return self._model.answer(questions, Sampling(_NEW_TOKENS))
        finally:
            self._model.template = own


@torch.no_grad()
def held_out_loss(model: LlavaModel, corpus: Corpus, capacity: int, features: Features) -> float:
    """Return the mean loss a target token over a corpus, nothing learned."""
    total, targets = torch.zeros((), device=model.device), 0
    micros: Sequence[Sequence[int]] = corpus.batch(corpus.samples, capacity).samples
    for packed, found in features.load(micros):
        total += model.loss(packed, found)
        targets += len(packed.targets_M)
    return float(total) / targets
