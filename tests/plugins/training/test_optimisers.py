"""Optimisers and schedules: those of torch, bitsandbytes and transformers, resumed and divided."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Command, RecipeWriter
from tests.core import processes
from tests.core.engine.test_distributed import llava_run as torchrun
from tests.plugins.training.test_sharded import losses, same, sets, tensors
from tests.plugins.training.test_sharded_checkpoints import GENTLE, as_if_killed
from torch import Tensor, nn

from llavakit import PluginError
from llavakit_plugins.training.adamw import AdamW, AdamWOptions
from llavakit_plugins.training.adamw8bit import AdamW8bit
from llavakit_plugins.training.kinds import Group, Optimiser, Schedule
from llavakit_plugins.training.muon import Muon, MuonOptions
from llavakit_plugins.training.muon_stacked import orthogonal
from llavakit_plugins.training.optimiser import Rates, Updates
from llavakit_plugins.training.schedules import (
    Constant,
    Cosine,
    FallingOptions,
    Linear,
    Wsd,
    WsdOptions,
)
from llavakit_plugins.training.testing import OptimiserContract, ScheduleContract


def theirs(kind: str, steps: int, share: float, **more: Any) -> list[float]:
    """Return transformers' learning rates, of a peak of 2."""
    import transformers

    peer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    rising = math.ceil(share * steps)
    if kind == "constant":
        made = transformers.get_constant_schedule_with_warmup(peer, rising)
    elif kind == "linear":
        made = transformers.get_linear_schedule_with_warmup(peer, rising, steps)
    elif kind == "cosine":
        made = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            peer, rising, steps, min_lr_rate=more["floor"]
        )
    else:
        falling = math.ceil(more["decay"] * (steps - rising))
        made = transformers.get_wsd_schedule(
            peer, rising, falling, num_training_steps=steps,
            decay_type=more["shape"], min_lr_ratio=more["floor"],
        )  # fmt: skip
    found = []
    for _ in range(steps):
        found.append(made.get_last_lr()[0])
        peer.step()
        made.step()
    return found


@pytest.mark.parametrize(("steps", "share"), [(1, 0.0), (7, 0.0), (50, 0.03), (40, 0.5)])
@pytest.mark.parametrize(
    ("schedule", "more"),
    [
        (Constant(), {}),
        (Linear(FallingOptions()), {}),
        (Cosine(FallingOptions(floor=0.2)), {"floor": 0.2}),
        *(
            (Wsd(WsdOptions(decay=0.3, shape=shape, floor=0.1)),
             {"decay": 0.3, "shape": shape, "floor": 0.1})
            for shape in ("cosine", "linear", "1-sqrt")
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_learning_rates_are_those_of_transformers(
    schedule: Schedule, more: Mapping[str, Any], steps: int, share: float
) -> None:
    ours = Rates(schedule, steps, share)
    expected = theirs(schedule.name, steps, share, **more)
    rising = math.ceil(share * steps)
    # transformers' wsd rises from its floor, ours from 0, as all others do
    expected[:rising] = [2 * step / rising for step in range(rising)]
    assert [2 * ours(step) for step in range(steps)] == pytest.approx(expected, abs=1e-12)


# -- optimisers --------------------------------------------------------------------------------


def weights() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"layer.weight": (96, 64), "layer.bias": (96,), "embed.weight": (70, 64)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def gradients(step: int) -> dict[str, Tensor]:
    torch.manual_seed(100 + step)
    return {name: torch.randn_like(p) for name, p in weights().items()}


def take(named: Mapping[str, nn.Parameter], updates: Updates, *steps: int, bad: int = -1) -> None:
    for step in steps:
        for name, gradient in gradients(step).items():
            named[name].grad = gradient * (math.nan if step == bad else 1)
        updates.step(step)


def updates_of(named: Mapping[str, nn.Parameter], optimiser: Optimiser) -> Updates:
    groups = [
        Group({name: p for name, p in named.items() if name != "embed.weight"}, 0.1, 0.01),
        Group({"embed.weight": named["embed.weight"]}, 0.05),
    ]
    return Updates(groups, Rates(Linear(FallingOptions()), 8, 0.0), optimiser=optimiser, clip=1e9)


def eight_bits() -> Optimiser:
    pytest.importorskip("bitsandbytes")
    return AdamW8bit(AdamWOptions())


OPTIMISERS: Mapping[str, Callable[[], Optimiser]] = {
    "adamw": lambda: AdamW(AdamWOptions()),
    "adamw8bit": eight_bits,
    "muon": lambda: Muon(MuonOptions()),
    "stacked": lambda: Muon(MuonOptions(stacked=True)),
}


def peers(name: str, named: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Return what others have: each parameter at its own rate and decay."""
    rates = {"layer.weight": (0.1, 0.01), "layer.bias": (0.1, 0.01), "embed.weight": (0.05, 0.0)}
    tables = {
        key: {"params": [p], "lr": rates[key][0], "weight_decay": rates[key][1]}
        for key, p in named.items()
    }
    adamw = torch.optim.AdamW
    if name in ("muon", "stacked"):
        matrix = tables.pop("layer.weight")
        muon = torch.optim.Muon([matrix], momentum=0.95, adjust_lr_fn="match_rms_adamw")
        return [muon, adamw([*tables.values()])]
    if name == "adamw8bit":
        import bitsandbytes

        made: Any = bitsandbytes.optim
        return [made.AdamW8bit([*tables.values()])]
    return [adamw([*tables.values()])]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_updates_are_those_of_the_libraries(name: str) -> None:
    mine, other = weights(), weights()
    updates = updates_of(mine, OPTIMISERS[name]())
    theirs = peers(name, other)
    for step in range(8):
        take(mine, updates, step)
        for one in theirs:
            for table in one.param_groups:
                table["lr"] = table.setdefault("peak", table["lr"]) * (1 - step / 8)
        for key, gradient in gradients(step).items():
            other[key].grad = gradient
        for one in theirs:
            one.step()
    assert updates.rates == pytest.approx([0.1 / 8, 0.05 / 8])
    for key, weight in other.items():
        assert (weight - weights()[key]).abs().max() > 0.1
        # torch's Muon rounds to bfloat16 what stacks keep in float32
        atol = 0.02 if (name, key) == ("stacked", "layer.weight") else 2e-6
        torch.testing.assert_close(mine[key], weight, atol=atol, rtol=1e-5, msg=key)


def test_stacked_matrices_become_orthogonal_as_in_float64() -> None:
    """Newton-Schulz iterations move singular values by a polynomial and keep the vectors."""
    for shape in ((3, 24, 16), (2, 16, 24), (1, 16, 16), (2, 8, 40), (1, 40, 8)):
        torch.manual_seed(sum(shape))
        matrices = torch.randn(shape)
        matrices[0, 1:] *= 1e-3  # most singular values are small, as those of gradients are
        found = orthogonal(matrices, iterations=4)
        assert found.shape == shape
        for matrix, one in zip(matrices.numpy(), found.numpy(), strict=True):
            left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
            values /= np.linalg.norm(values)
            for _ in range(4):
                values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
            np.testing.assert_allclose(one, left * values @ right, atol=2e-5)
    assert not orthogonal(torch.zeros(1, 2, 3), iterations=5).any()


SHAPES = [(1, 24), (24, 1), (2, 24), (5, 7), (24, 16), (16, 48)]


def divided_and_whole(arguments: list[str]) -> int:
    """Take steps with whole matrices and with divided ones; leave in a file what differs."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    whole = {str(shape): nn.Parameter(torch.randn(shape)) for shape in SHAPES}
    parts = {
        name: nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
        for name, weight in whole.items()
    }
    muon, rates = OPTIMISERS[arguments[0]], Rates(Linear(FallingOptions()), 3, 0.0)
    updates = [
        Updates([Group(named, 0.1, 0.01)], rates, optimiser=muon(), clip=1e9)
        for named in (whole, parts)
    ]
    for step in range(3):
        for name, weight in whole.items():
            weight.grad = torch.randn(weight.shape)
            parts[name].grad = distribute_tensor(weight.grad, mesh, [Shard(0)])
        for one in updates:
            one.step(step)
    for name, part in parts.items():
        assert isinstance(part, DTensor)
        found = part.full_tensor()
        # one rounding of bfloat16, which may differ in products of several matrices
        torch.testing.assert_close(found, whole[name], atol=4e-3, rtol=0, msg=name)
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("name", ["muon", "stacked"])
def test_divided_matrices_of_any_shape_are_updated_as_whole_ones(tmp_path: Path, name: str) -> None:
    """Also those with fewer rows than devices, as adapters have on many devices."""
    ended = processes.run_ranks(tmp_path, 3, name, program=divided_and_whole)
    assert ended.code == 0, ended.said


@pytest.mark.parametrize("name", OPTIMISERS)
def test_resumed_updates_are_the_same_bits(name: str) -> None:
    whole, before, after = weights(), weights(), weights()
    take(whole, updates_of(whole, OPTIMISERS[name]()), *range(8))
    first = updates_of(before, OPTIMISERS[name]())
    take(before, first, *range(5))
    kept = {key: tensor.clone() for key, tensor in first.tensors().items()}
    second = updates_of(after, OPTIMISERS[name]())
    second.restore(kept)
    assert second.tensors().keys() == kept.keys()
    for key, tensor in second.tensors().items():
        assert torch.equal(tensor, kept[key]), key
    take(after, second, *range(5, 8))
    for key, weight in whole.items():
        assert torch.equal(after[key], weight), key


@pytest.mark.parametrize("name", OPTIMISERS)
def test_after_what_is_no_number_nothing_changes(name: str) -> None:
    named = weights()
    updates = updates_of(named, OPTIMISERS[name]())
    take(named, updates, 0, 1, 2)
    kept = {key: tensor.clone() for key, tensor in updates.tensors().items()}
    take(named, updates, 3, 4, bad=3)
    for key, tensor in updates.tensors().items():
        assert torch.equal(tensor, kept[key]), key


def test_a_state_of_8_bits_is_read_by_another_number_of_devices() -> None:
    """Other numbers have other blocks: what they read is the same within a byte's precision."""
    named = weights()
    updates = updates_of(named, eight_bits())
    take(named, updates, *range(5))
    found = updates.tensors()
    halves = found["scales1/layer.weight"].clone()
    halves.view(-1)[:100] *= 0.5  # as if a block ended within what is one here
    codes = found["codes1/layer.weight"]
    other = weights()
    second = updates_of(other, eight_bits())
    second.restore({**found, "scales1/layer.weight": halves})
    again = second.tensors()
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    table = torch.as_tensor(functional.create_dynamic_map(signed=True))
    expected = table[codes.long()] * halves
    read = table[again["codes1/layer.weight"].long()] * again["scales1/layer.weight"]
    assert (read - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda give, groups: give(groups[:1]),
         r"`adamw` leaves out 1 parameters, the first is `embed.weight"),
        (lambda give, groups: [*give(groups), *give(groups[1:])],
         r"`adamw` takes `embed.weight` twice"),
        (lambda give, groups: [*give(groups), torch.optim.SGD([nn.Parameter(torch.zeros(3))])],
         r"`adamw` takes a weight of shape \(3,\) that is not trained"),
        (lambda give, groups: None, r"`adamw` returned None from `optimizers`"),
        (lambda give, groups: [nn.Linear(1, 1)], r"return a list of optimisers of torch"),
    ],
    ids=["missing", "twice", "foreign", "none", "no optimiser"],
)  # fmt: skip
def test_an_optimiser_takes_each_parameter_once(change: Any, sentence: str) -> None:
    class Odd(AdamW):
        def optimizers(self, groups: Any) -> Any:
            return change(super().optimizers, groups)

    with pytest.raises(PluginError, match=sentence):
        updates_of(weights(), Odd(AdamWOptions()))


# -- in a recipe -------------------------------------------------------------------------------


def test_recipes_choose_them_by_name_or_with_options(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    found = []
    for number, options in enumerate([
        {}, {"schedule": "cosine", "optimiser": "adamw", "betas": "[0.9, 0.999]"},
        {"optimiser": '{ use = "adamw", betas = [0.5, 0.999] }'}, {"betas": "[0.5, 0.999]"},
        {"schedule": '{ use = "wsd", decay = 0.5 }'}, {"optimiser": "muon"},
    ]):  # fmt: skip
        given = sets(**{f"steps.finetune.{key}": value for key, value in options.items()})
        out = tmp_path / str(number)
        ran = llava_run(write_recipe(), *sets(**GENTLE), *given, "--out", out)
        assert ran.code == 0, ran.err
        found.append((losses(out), tensors(out / "model")))
    for one, other in ((0, 1), (2, 3)):
        assert found[one][0] == found[other][0]
        for name, weight in found[one][1].items():
            assert torch.equal(weight, found[other][1][name])
    assert len({tuple(values) for values, _ in found}) == 4


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"optimiser": "adamv"}, "no Optimiser is called `adamv`; did you mean `adamw`?"),
        ({"schedule": "cosin"}, "no Schedule is called `cosin`; did you mean `cosine`?"),
        ({"schedule": '{ use = "wsd", decay = 2 }'}, "option `decay` of `wsd`: input should be"),
        ({"optimiser": '{ use = "muon", momentun = 0.9 }'}, "did you mean `momentum`?"),
        ({"optimiser": '{ use = "adamw", betas = [0.9, 0.9] }', "betas": "[0.9, 0.9]"},
         "`betas` are in `optimiser` already"),
        ({"optimiser": "3"}, "option `optimiser` of `finetune` is a table"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_said(
    write_recipe: RecipeWriter, refused: Callable[..., str], setting: dict[str, str], said: str
) -> None:
    given = sets(**{f"steps.finetune.{key}": value for key, value in setting.items()})
    assert said in refused(write_recipe(), "--plan", *given)


def test_an_optimiser_without_its_library_is_said_before_anything_runs(
    write_recipe: RecipeWriter, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llavakit_plugins.training.adamw8bit.find_spec", lambda name: None)
    said = refused(write_recipe(), *sets(**{"steps.finetune.optimiser": "adamw8bit"}))
    assert "`adamw8bit` needs bitsandbytes, which is not installed" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw8bit", "muon"])
def test_divided_over_processes_they_learn_the_same_and_resume(
    write_recipe: RecipeWriter, tmp_path: Path, name: str
) -> None:
    OPTIMISERS[name]()
    more = {"steps.finetune.optimiser": name, "steps.finetune.keep": "9"}
    arguments = (write_recipe(), *sets(**GENTLE, **more))
    one, two = tmp_path / "one", tmp_path / "two"
    assert processes.run(tmp_path, *arguments, "--out", one) == 0
    run = torchrun(2, *arguments, "--out", two)
    assert run.returncode == 0, run.stderr
    # a byte, or Muon's bfloat16, rounds a difference of the last digit to one of its own steps
    assert losses(two) == pytest.approx(losses(one), abs=2e-4)
    same(one / "model", two / "model", atol=2e-4)
    again = as_if_killed(two, tmp_path / "again", 2)
    run = torchrun(2, *arguments, "--out", again, "--resume")
    assert run.returncode == 0, run.stderr
    assert losses(again)[-4:] == losses(two)[-4:]
    same(two / "model", again / "model", atol=0)
    alone = as_if_killed(two, tmp_path / "alone", 4)
    assert processes.run(tmp_path, *arguments, "--out", alone, "--resume") == 0
    same(two / "model", alone / "model", atol=2e-4)


# -- contracts ---------------------------------------------------------------------------------


class TestAdamW(OptimiserContract):
    def build(self) -> Optimiser:
        return OPTIMISERS["adamw"]()


class TestAdamW8bit(OptimiserContract):
    def build(self) -> Optimiser:
        return OPTIMISERS["adamw8bit"]()


class TestMuon(OptimiserContract):
    def build(self) -> Optimiser:
        return OPTIMISERS["muon"]()


class TestStackedMuon(OptimiserContract):
    def build(self) -> Optimiser:
        return OPTIMISERS["stacked"]()


class TestConstant(ScheduleContract):
    def build(self) -> Schedule:
        return Constant()


class TestCosine(ScheduleContract):
    def build(self) -> Schedule:
        return Cosine(FallingOptions())


class TestLinear(ScheduleContract):
    def build(self) -> Schedule:
        return Linear(FallingOptions())


class TestWsd(ScheduleContract):
    def build(self) -> Schedule:
        return Wsd(WsdOptions())


def test_what_breaks_an_optimisers_contract_is_said() -> None:
    class Forgetful(AdamW):
        """AdamW at a rate of its own, whose state is not the parameter's."""

        def optimizers(self, groups: Any) -> Any:
            (made,) = super().optimizers(groups)
            for table in made.param_groups:
                table["lr"] = 0.01
            made.register_step_post_hook(self._forget)
            return [made]

        @staticmethod
        def _forget(made: Any, *_: object) -> None:
            for state in made.state.values():
                state["exp_avg"] = state["exp_avg"].flatten()[:1]

    class Broken(OptimiserContract):
        def build(self) -> Optimiser:
            return Forgetful(AdamWOptions())

    with pytest.raises(AssertionError, match="ten times the rate"):
        AdamWAtOneRate().test_the_rate_decides_how_far()
    with pytest.raises(AssertionError, match="Stateful"):
        Broken().test_it_goes_on_from_what_was_saved()


class AdamWAtOneRate(OptimiserContract):
    def build(self) -> Optimiser:
        class OneRate(AdamW):
            """AdamW at a rate of its own."""

            def optimizers(self, groups: Any) -> Any:
                return super().optimizers([Group(one.named, 0.01) for one in groups])

        return OneRate(AdamWOptions())


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (lambda step, steps: 2.0, "a number from 0 to 1"),
        (lambda step, steps: step / steps, "a rate above 0"),
    ],
)
def test_what_breaks_a_schedules_contract_is_said(
    share: Callable[[int, int], float], said: str
) -> None:
    class Odd(Constant):
        """A schedule."""

        def share(self, step: int, steps: int) -> float:
            return share(step, steps)

    class Broken(ScheduleContract):
        def build(self) -> Schedule:
            return Odd()

    def check() -> None:
        Broken().test_it_gives_a_share_of_the_peak_for_every_step()
        Broken().test_some_step_learns()

    with pytest.raises(AssertionError, match=said):
        check()
