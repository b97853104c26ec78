"""Learning from preferences, behind the two stages of the paper."""

from __future__ import annotations

from llavakit import Use
from llavakit_plugins.steps.train import TrainStep
from llavakit_plugins.training.kinds import Objective
from llavakit_plugins.training.options import TrainOptions


class PreferOptions(TrainOptions):
    """Options of training, on samples that have a chosen and a rejected answer; `batch_size` counts
    pairs of answers."""

    objective: Use[Objective] = Use[Objective](use="dpo")
    """What is made small: `"dpo"`, or `{ use = "dpo", beta = 0.2, loss = "ipo" }`."""


class Prefer(TrainStep):
    """Chosen answers become likelier than rejected ones (DPO, arXiv 2305.18290)."""

    name = "prefer"
    Options = PreferOptions
