"""The kinds of component that training adds: objectives, optimisers, and schedules of the rate.

M supervised rows of a micro-batch, S samples in it, E width of the language model.

They are declared as any package may declare kinds of its own: by entry points of the group
`llavakit.kinds`. Nothing here imports torch, so that recipes are checked without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llavakit import Component

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from llavakit import LanguageModel


class Schedule(Component):
    """The learning rate of each step. Built as `Schedule(options)`."""

    hook = "llava_schedules"

    @abstractmethod
    def share(self, step: int, steps: int) -> float:
        """Return the rate at `step` of `steps`, counted from 0, as a share of its peak.

        Steps of the warm-up, in which training lets the rate rise from 0 to 1, come before and are
        not among them.
        """


@dataclass(frozen=True)
class Group:
    """Parameters, by their names in the model, that share a peak learning rate and a decay."""

    named: Mapping[str, nn.Parameter]
    peak: float
    weight_decay: float = 0.0


class Optimiser(Component):
    """Updates weights by their gradients. Built as `Optimiser(options)`."""

    hook = "llava_optimisers"
    state_bytes: ClassVar[float] = 8.0  #: Memory of its state for each parameter, for plans.

    @abstractmethod
    def optimizers(self, groups: Sequence[Group]) -> Sequence[Optimizer]:
        """Return optimisers of torch that update each of these parameters in one of them.

        `lr` of their parameter groups is the peak, as a rule the group's: training multiplies it
        by the schedule's share before each step. Gradients are clipped before. Parameters may be
        divided over devices (DTensor). What an optimiser has in `state` are tensors in the shape of
        the parameter, and `step`: they are saved and restored. One with a state of another form is
        a `Stateful`, too.
        """


class Stateful:
    """An optimiser of torch that says itself what of its state is saved."""

    def saved(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """Return tensors by name: single numbers, or in the parameter's shape and divided as it.

        Empty before the first step.
        """
        raise NotImplementedError

    def restore(self, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        """Take what `saved` returned, perhaps of another number of devices."""
        raise NotImplementedError


@dataclass(frozen=True)
class Predicted:
    """What a model makes of the supervised rows of a micro-batch."""

    language: LanguageModel  #: `logits(hidden_ME)`, `loss(hidden_ME, targets_M)`.
    hidden_ME: Tensor  #: Final hidden states of the rows before the supervised tokens.
    targets_M: Tensor  #: Those tokens, int64.
    counts: tuple[int, ...]  #: How many of the rows lie in each sample, in order; on the host.
    reference_S: Tensor | None = None
    """Of each sample, the log-probability that the model gave its supervised tokens together
    before training, float32; where the objective `refers` to it."""


class Objective(Component):
    """What training makes small. Built as `Objective(options)`."""

    hook = "llava_objectives"
    compares: ClassVar[bool] = False
    """Whether it compares two answers: samples 2n and 2n + 1 of a micro-batch are then the chosen
    and the rejected one, in which the last answer alone is supervised."""
    refers: ClassVar[bool] = False  #: Whether it looks at what the model was before training.
    figures: ClassVar[Sequence[str]] = ()  #: Names of what it reports beside the loss.

    @abstractmethod
    def loss(self, predicted: Predicted) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the loss, float32 `[]`, and one value `[]` without gradient for each of `figures`.

        All are sums over a micro-batch; training adds them up over a step, on all devices, and
        divides by `weight`.
        """

    def weight(self, samples: int, supervised: int) -> int:
        """Return what sums over so many samples, with so many supervised rows, are divided by."""
        return supervised
