"""The usual objective: the next token. Without torch, as plans need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llavakit_plugins.training.kinds import Objective, Predicted

if TYPE_CHECKING:
    from torch import Tensor


class NextToken(Objective):
    """The cross-entropy of each supervised token: instruction tuning, as in the paper."""

    name = "next-token"

    def loss(self, predicted: Predicted) -> tuple[Tensor, Sequence[Tensor]]:
        # by the language model itself, which may have a kernel that fuses its head with the loss
        return predicted.language.loss(predicted.hidden_ME, predicted.targets_M), ()
