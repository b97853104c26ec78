"""The kinds of component that training adds: optimisers, and schedules of the learning rate.

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
