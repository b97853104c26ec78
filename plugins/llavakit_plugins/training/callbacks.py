"""Callbacks: what others want to see, or change, of a model while it trains.

A kind that the training package declares, by an entry point of the group `llavakit.kinds`. Nothing
here imports torch, so that recipes are checked without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from llavakit import Component, Run, Use
from llavakit.contracts.model import LlavaModel


@dataclass(frozen=True)
class Training:
    """A training as it stands."""

    model: LlavaModel
    """Its weights may be changed, without a gradient; on several devices they may be divided
    (DTensor)."""
    run: Run
    """`run.event` tells trackers something, `run.directory` keeps what a resumed run needs."""
    step: int  #: Optimisation steps that are done.
    steps: int  #: Of the whole training.


class Callback(Component):
    """Called while a model trains, in every process. Built as `Callback(options)`.

    What it raises ends the training. One that waits for the device makes each step slower.
    """

    hook = "llava_callbacks"

    def begin(self, training: Training) -> None:
        """Called once before the first step; of a resumed run, `training.step` are done already."""

    @abstractmethod
    def on_step(self, training: Training) -> None:
        """Called after each step: weights are updated; validation and checkpoint come next."""

    def end(self, training: Training) -> None:
        """Called after the last step, before the model is written; not where the run is stopped."""


class Callbacks:
    """Those of one training."""

    def __init__(
        self, model: LlavaModel, run: Run, steps: int, chosen: Sequence[Use[Callback]]
    ) -> None:
        self._model, self._run, self._steps = model, run, steps
        self._all = [run.build(use) for use in chosen]

    def begin(self, step: int) -> None:
        """Tell all of them that training begins, with so many steps done."""
        for callback in self._all:
            callback.begin(self._at(step))

    def on_step(self, step: int) -> None:
        """Tell all of them that a step is done."""
        for callback in self._all:
            callback.on_step(self._at(step))
        for callback in self._all if step == self._steps else ():
            callback.end(self._at(step))

    def _at(self, step: int) -> Training:
        return Training(self._model, self._run, step, self._steps)
