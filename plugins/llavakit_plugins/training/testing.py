"""The contracts of the kinds that training adds: subclass one, say how to build, run pytest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit import PARTS, LanguageModel
from llavakit.contracts.run import ProcessGroup
from llavakit.testing import Contract, hold, holding
from llavakit_plugins.training.callbacks import Callback, Training
from llavakit_plugins.training.kinds import Group, Objective, Optimiser, Predicted, Schedule
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


class _Language(nn.Module):
    """What an objective may ask of a language model, in small."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)

    def logits(self, hidden_ME: Tensor) -> Tensor:
        found: Tensor = self.head(hidden_ME)
        return found

    def loss(self, hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden_ME), targets_M, reduction="sum")


class ObjectiveContract(Contract[Objective]):
    """Checks an `Objective`: a sum over samples, whose gradient leads to less of it."""

    kind = Objective
    counts: ClassVar[Sequence[int]] = (3, 2, 4, 3, 5, 1)
    """Supervised rows of each sample to try it with; an even number of samples."""

    def predicted(self, samples: slice = slice(None)) -> Predicted:
        """Return what a model makes of some of the samples, always the same."""
        draw = torch.Generator().manual_seed(0)
        language = _Language(8, 11)
        language.head.weight.data = torch.randn(11, 8, generator=draw)
        hidden = torch.randn(sum(self.counts), 8, generator=draw).split(list(self.counts))
        targets = torch.randint(11, (sum(self.counts),), generator=draw).split(list(self.counts))
        reference = torch.randn(len(self.counts), generator=draw) - 9
        return Predicted(
            cast("LanguageModel", language),
            torch.cat(hidden[samples]).requires_grad_(),
            torch.cat(targets[samples]),
            tuple(self.counts[samples]),
            reference[samples] if self.build().refers else None,
        )

    def test_it_gives_a_loss_and_its_figures(self) -> None:
        objective = self.build()
        loss, figures = objective.loss(self.predicted())
        hold(
            loss.shape == () and loss.dtype == torch.float32 and torch.isfinite(loss),
            "the loss is one finite number in float32", f"{loss.dtype} {list(loss.shape)}",
            "return a sum over all rows, and add up in float32",
        )  # fmt: skip
        hold(loss.requires_grad, "the loss has a gradient", "it has none", "do not detach it")
        hold(
            len(figures) == len(objective.figures) and not any(f.requires_grad for f in figures),
            f"one value without gradient for each of {list(objective.figures)}",
            [tuple(figure.shape) for figure in figures],
            "name them in `figures`, and return the detached sums in that order",
        )  # fmt: skip
        hold(
            objective.weight(4, 100) > 0, "`weight` is above 0", objective.weight(4, 100),
            "return the number of supervised rows, of samples or of pairs",
        )  # fmt: skip

    def test_micro_batches_add_up(self) -> None:
        objective = self.build()
        whole, figures = objective.loss(self.predicted())
        parts = [objective.loss(self.predicted(slice(at, at + 2)))
                 for at in range(0, len(self.counts), 2)]  # fmt: skip
        summed = [sum(float(part.detach()) for part, _ in parts)]
        summed += [sum(float(own[n]) for _, own in parts) for n in range(len(figures))]
        for name, one, other in zip(
            ("loss", *objective.figures), [whole, *figures], summed, strict=True
        ):
            hold(
                abs(float(one.detach()) - other) <= 1e-4 * max(1, abs(other)),
                f"`{name}` of a micro-batch is the sum over its samples, however they are cut up",
                f"{float(one.detach()):.6g}, in parts {other:.6g}",
                "return sums: training divides them by `weight`",
            )  # fmt: skip

    def test_its_gradient_leads_to_less_of_it(self) -> None:
        predicted = self.predicted()
        loss, _ = self.build().loss(predicted)
        loss.backward()
        gradient = predicted.hidden_ME.grad
        hold(
            gradient is not None and gradient.abs().max() > 0,
            "the hidden states have a gradient", "they have none", "compute it from `hidden_ME`",
        )  # fmt: skip
        assert gradient is not None
        step = 1e-3 / float(gradient.norm())
        with torch.no_grad():
            moved = replace(predicted, hidden_ME=predicted.hidden_ME - step * gradient)
            less, _ = self.build().loss(moved)
        hold(less < loss, "a step against it lowers the loss", f"{loss} to {less}", "fix its sign")


class _Small(nn.Module):
    """A model of parts that have a layer each."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class CallbackContract(Contract[Callback]):
    """Checks a `Callback`: called around a training of a model that learns."""

    kind = Callback
    changes_weights: ClassVar[bool] = False
    """Whether it may change the model's weights."""

    def model(self) -> Any:
        """Return what trains; one that needs more of a model than parts of a layer overrides it."""
        parts = {part: nn.Linear(4, 4) for part in PARTS}
        return _Small(parts)

    def test_it_is_called_from_the_first_step_to_the_last(self) -> None:
        model = self.model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        told: list[str] = []
        run: Any = SimpleNamespace(
            directory=self.tmp_path, seed=0, resume=False, device=torch.device("cpu"),
            event=lambda name, **values: told.append(json.dumps({"event": name, **values})),
            progress=lambda *_: None, stopping=lambda: False, process_group=ProcessGroup(),
        )  # fmt: skip
        callback = self.build()
        with holding("`begin`, `on_step` and `end` take a `Training`", "let them return"):
            for step in range(4):
                at = Training(model, run, step, 3)
                callback.on_step(at) if step else callback.begin(at)
            callback.end(Training(model, run, 3, 3))
        changed = [name for name, t in model.state_dict().items() if not t.equal(before[name])]
        hold(
            self.changes_weights or not changed, "the model's weights stay as they are", changed,
            "copy what you change, or set `changes_weights = True`",
        )  # fmt: skip
