"""The contracts of the kinds that training adds: subclass one, say how to build, run pytest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from llavakit.testing import Contract, hold, holding
from llavakit_plugins.training.kinds import Group, Optimiser, Schedule
from llavakit_plugins.training.optimiser import Updates


class ScheduleContract(Contract[Schedule]):
    """Checks a `Schedule`."""

    kind = Schedule
    lengths: ClassVar[Sequence[int]] = (1, 2, 7, 1000)
    """Numbers of steps to try it with."""

    def test_it_gives_a_share_of_the_peak_for_every_step(self) -> None:
        for steps in self.lengths:
            for step in range(steps):
                with holding(f"a share for step {step} of {steps}", "let `share` answer for each"):
                    share = self.build().share(step, steps)
                hold(
                    isinstance(share, float) and 0 <= share <= 1,
                    f"a number from 0 to 1 for step {step} of {steps}", repr(share),
                    "return a share of the peak: the rate itself is the step's `train`",
                )  # fmt: skip

    def test_some_step_learns(self) -> None:
        for steps in self.lengths:
            shares = [self.build().share(step, steps) for step in range(steps)]
            hold(
                any(shares), f"a rate above 0 in {steps} steps", shares[:5],
                "the warm-up is training's own: begin with the peak",
            )  # fmt: skip

    def test_it_depends_on_nothing_but_the_step(self) -> None:
        schedule = self.build()
        for steps in self.lengths:
            forward = [schedule.share(step, steps) for step in range(steps)]
            backward = [self.build().share(step, steps) for step in reversed(range(steps))]
            hold(
                forward == backward[::-1],
                "a resumed run has the rates of an unbroken one", f"others for {steps} steps",
                "keep nothing on `self` in `share`",
            )  # fmt: skip


class OptimiserContract(Contract[Optimiser]):
    """Checks an `Optimiser`: it updates every parameter, by its group's rate, and is resumed."""

    kind = Optimiser
    steps: ClassVar[int] = 6
    shapes: ClassVar[Sequence[tuple[int, ...]]] = ((96, 64), (64,), (3, 2, 2, 2), (70, 64))
    """Shapes of the weights to try it with."""

    def weights(self) -> dict[str, nn.Parameter]:
        draw = torch.Generator().manual_seed(0)
        names = (f"layer.{number}.weight" for number in range(len(self.shapes)))
        found = zip(names, self.shapes, strict=True)
        return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in found}

    def updates(self, named: dict[str, nn.Parameter], rate: float = 0.01) -> Updates:
        """Return updates of two groups; the second one learns at a tenth of the rate."""
        half = len(named) // 2
        first, second = dict([*named.items()][:half]), dict([*named.items()][half:])
        groups = [Group(first, rate, 0.01), Group(second, rate / 10)]
        with holding("`optimizers` takes two groups", "return optimisers of torch"):
            return Updates(groups, lambda step: 1.0, optimiser=self.build(), clip=1e9)

    def take(self, named: dict[str, nn.Parameter], updates: Updates, steps: range) -> None:
        for step in steps:
            draw = torch.Generator().manual_seed(100 + step)
            for parameter in named.values():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            with holding(f"step {step + 1} is taken", "let `step` work on a CPU in float32"):
                updates.step(step)

    def test_every_weight_is_updated(self) -> None:
        named, before = self.weights(), self.weights()
        self.take(named, self.updates(named), range(self.steps))
        for name, weight in named.items():
            hold(
                torch.isfinite(weight).all() and not torch.equal(weight, before[name]),
                f"`{name}` of shape {list(weight.shape)} changes", "it is the same, or no number",
                "update what no rule of yours takes by AdamW (`fused_adamw`)",
            )  # fmt: skip

    def test_the_rate_decides_how_far(self) -> None:
        moved: list[dict[str, float]] = []
        for rate in (0.01, 0.001):
            named, before = self.weights(), self.weights()
            self.take(named, self.updates(named, rate), range(self.steps))
            moved.append(
                {n: (w - before[n]).detach().abs().mean().item() for n, w in named.items()}
            )
        for name, far in moved[0].items():
            hold(
                far > 3 * moved[1][name],
                f"ten times the rate moves `{name}` further", f"{far:.3g}, {moved[1][name]:.3g}",
                "set `lr` of each parameter group to its group's peak, and read it in each step",
            )  # fmt: skip

    def test_it_goes_on_from_what_was_saved(self) -> None:
        whole, before, after = self.weights(), self.weights(), self.weights()
        self.take(whole, self.updates(whole), range(self.steps))
        half = self.steps // 2
        first = self.updates(before)
        self.take(before, first, range(half))
        kept: dict[str, Tensor] = {}
        for key, tensor in first.tensors().items():
            kind, _, name = key.partition("/")
            hold(
                isinstance(tensor, Tensor) and (tensor.ndim == 0 or
                                                tensor.shape == before[name].shape),
                "its state are tensors: single numbers, or in the parameter's shape",
                f"`{kind}` of {list(before[name].shape)}: {getattr(tensor, 'shape', tensor)}",
                "derive it from `Stateful`, too, and say in `saved` what is kept",
            )  # fmt: skip
            kept[key] = tensor.clone()
        second = self.updates(after)
        with holding("it takes what it saved", "take in `restore` what `saved` returns"):
            second.restore(kept)
        self.take(after, second, range(half, self.steps))
        for name, weight in whole.items():
            hold(
                torch.equal(after[name], weight),
                f"`{name}` is bit for bit what an unbroken run gives", "it differs",
                "keep all of its state in `state`, or say it in `saved`",
            )  # fmt: skip
