"""An objective that compares: the better one of two answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llavakit import LanguageModel, Options
from llavakit_plugins.training.kinds import Objective, Predicted

_LOGITS = 1 << 25  # that exist at one time


class DpoOptions(Options):
    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to what it was before: rewards are `beta` times the logarithm
    of how much more likely an answer has become."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Of the difference of two rewards: DPO's own, IPO's square (arXiv 2310.12036; of means over
    tokens), or a hinge (SLiC, arXiv 2305.10425)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """The share of pairs that are thought to be the wrong way round (cDPO), for `sigmoid`."""


class Dpo(Objective):
    """Direct preference optimisation (arXiv 2305.18290): chosen answers become likelier than
    rejected ones, by the model's own probabilities before training."""

    name = "dpo"
    Options = DpoOptions
    options: DpoOptions
    compares = True
    refers = True
    figures = ("rewards/chosen", "rewards/rejected", "rewards/accuracy", "rewards/margin")

    def weight(self, samples: int, supervised: int) -> int:
        return samples // 2

    def loss(self, predicted: Predicted) -> tuple[Tensor, Sequence[Tensor]]:
        assert predicted.reference_S is not None
        logprobs_S = sample_logprobs(predicted)
        ratios_S = logprobs_S - predicted.reference_S
        rewards_S = self.options.beta * ratios_S.detach()
        chosen, rejected = rewards_S[0::2], rewards_S[1::2]
        told = (chosen, rejected, (chosen > rejected).float(), chosen - rejected)
        if self.options.loss == "ipo":
            counts_S = torch.tensor(predicted.counts, device=ratios_S.device)
            ratios_S = ratios_S / counts_S
        loss = self._of(ratios_S[0::2] - ratios_S[1::2]).sum()
        return loss, [values.sum() for values in told]

    def _of(self, better: Tensor) -> Tensor:
        """Return each pair's loss, by how much likelier its chosen answer became than the other."""
        beta, smooth = self.options.beta, self.options.label_smoothing
        losses: Mapping[str, Callable[[], Tensor]] = {
            "sigmoid": lambda: (
                -F.logsigmoid(beta * better) * (1 - smooth) - F.logsigmoid(-beta * better) * smooth
            ),
            "ipo": lambda: (better - 1 / (2 * beta)) ** 2,
            "hinge": lambda: torch.relu(1 - beta * better),
        }
        return losses[self.options.loss]()


def sample_logprobs(predicted: Predicted) -> Tensor:
    """Return the log-probability of each sample's supervised tokens together, `[S]` float32."""
    logprobs_M = token_logprobs(predicted.language, predicted.hidden_ME, predicted.targets_M)
    # not by `index_add`, whose order changes from call to call on a GPU
    return torch.stack([own.sum() for own in logprobs_M.split(list(predicted.counts))])


def token_logprobs(language: LanguageModel, hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
    """Return the log-probability of each target, `[M]` float32.

    Logits exist for a part of the rows at a time, and are computed again in the backward pass.
    """

    def some(hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
        logits_MV = language.logits(hidden_ME).float()
        return -F.cross_entropy(logits_MV, targets_M, reduction="none")

    rows = max(1, _LOGITS // language.head.weight.shape[0])
    parts = zip(hidden_ME.split(rows), targets_M.split(rows), strict=True)
    if not torch.is_grad_enabled():
        found = [some(*part) for part in parts]
    else:
        found = [checkpoint(some, *part, use_reentrant=False) for part in parts]
    return torch.cat(found) if found else hidden_ME.new_zeros(0, dtype=torch.float32)
