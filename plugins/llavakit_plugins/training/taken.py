"""Steps of training: those to be taken, and those whose loss is still on the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from llavakit_plugins.training.corpus import Batch
from llavakit_plugins.training.parallel import Micro


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
    micros: list[Micro]
    """The micro-batches of this device."""
