"""What a run will cost, before anything is loaded: parameters, tokens, memory, time, money."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llavakit.contracts.component import Use
from llavakit.contracts.interfaces import Dataset, Step
from llavakit.engine.progress import duration
from llavakit.recipe.model_choice import PARTS
from llavakit.recipe.recipe import Machine, Recipe
from llavakit.registry import KindT, Registry
from llavakit_plugins.reporting.plain import aligned

if TYPE_CHECKING:
    from torch import nn

    from llavakit.model.llava import LlavaModel


class StepPlan(BaseModel):
    """What one step will cost. None: not known before it runs."""

    samples: int | None = None
    tokens: int | None = None
    """Rows of the packed stream, over all epochs."""
    steps: int | None = None
    """Optimisation steps."""
    tflop: float | None = None
    """Necessary work in 10^12 floating-point operations."""
    memory_gb: float | None = None
    """Of one device: weights, gradients, optimiser and activations of one micro-batch."""
    trained: tuple[str, ...] = ()
    cost_usd: float | None = None
    """What services will charge, as far as it can be known before."""
    note: str = ""


class PartPlan(BaseModel):
    """One component of the model."""

    component: str
    parameters: int
    width: int


class Plan(BaseModel):
    """What `--plan` prints and plan.json holds."""

    recipe: str
    parts: dict[str, PartPlan]
    visual_tokens: int | None
    """Of one image; None where the recipe has no model."""
    steps: dict[str, StepPlan]
    machine: Machine
    tflops: float | None
    """Rate reckoned with, of all devices; None where no step has anything to reckon."""
    measured: bool
    """Whether that rate was measured on this machine just now."""

    def hours(self, step: StepPlan) -> float | None:
        """Return the time of a step at the rate reckoned with."""
        if step.tflop is None or self.tflops is None:
            return None
        return step.tflop / self.tflops / 3600

    def render(self) -> str:
        """Return the plan as text."""
        rows = [["part", "component", "parameters", "width"]]
        rows += [
            [name, part.component, _count(part.parameters), str(part.width)]
            for name, part in self.parts.items()
        ]
        total = sum(part.parameters for part in self.parts.values())
        if self.parts:
            size = f"{_count(total)} parameters, {self.visual_tokens} tokens an image"
            lines = [f"{self.recipe}: {size}", "", *_aligned(rows), ""]
        else:
            lines = [f"{self.recipe}: no model of its own", ""]
        rows = [["step", "trains", "samples", "tokens", "steps", "TFLOP", "memory", "time"]]
        known: list[float] = []
        for name, step in self.steps.items():
            spent = self.hours(step)
            if spent is not None:
                known.append(spent)
            rows.append(
                [
                    name,
                    " + ".join(step.trained) or "-",
                    *(_count(value) for value in (step.samples, step.tokens, step.steps)),
                    "?" if step.tflop is None else f"{step.tflop:,.4g}",
                    "?" if step.memory_gb is None else f"{step.memory_gb:,.3g} GB",
                    "?" if spent is None else duration(spent * 3600),
                ]
            )
        lines += _aligned(rows)
        frozen = {
            name: ", ".join(part for part in self.parts if part not in step.trained)
            for name, step in self.steps.items()
            if self.parts and step.trained
        }
        lines += ["", *(f"{name}: {parts or 'nothing'} frozen" for name, parts in frozen.items())]
        lines += [f"{name}: {step.note}" for name, step in self.steps.items() if step.note]
        lines += self._total(known)
        charged = {n: step.cost_usd for n, step in self.steps.items() if step.cost_usd is not None}
        lines += [f"services: {usd:,.2f} USD for {name}" for name, usd in charged.items()]
        need = max((step.memory_gb or 0.0 for step in self.steps.values()), default=0.0)
        room = self.machine.memory_gb
        if room is not None and need > room:
            lines.append(
                f"memory: {need:,.0f} GB are needed, one device has {room:,.0f} GB; fewer "
                "micro_batch_tokens or `recompute = true` need less, and more devices where the "
                "language model learns"
            )
        return "\n".join(lines)

    def _total(self, known: list[float]) -> list[str]:
        """Return what all steps take together, of those whose hours are known."""
        if self.tflops is None or not known:
            return ["total: no step says its time", "cost: not known, as the time is not"]
        source = "measured just now" if self.measured else "as the recipe's [machine] says"
        rate = f"on {self.machine.name} at {self.tflops:,.3g} TFLOP/s ({source})"
        more = ", and what the steps with `?` take" if len(known) < len(self.steps) else ""
        hours, price = sum(known), self.machine.usd_per_hour
        usd = f"{hours * price:,.2f} USD at {price:g} USD/h"
        cost = usd if price else "no price; set machine.usd_per_hour"
        return [f"total: {duration(hours * 3600)} {rate}{more}", f"cost: {cost}"]


class Planner:
    """What a step's `plan` may ask."""

    def __init__(self, recipe: Recipe, registry: Registry) -> None:
        self._recipe, self._registry = recipe, registry
        self.steps: dict[str, StepPlan] = {}
        """The plans of the steps before, by name."""

    @property
    def seed(self) -> int:
        """The recipe's seed, which the run will have."""
        return self._recipe.seed

    @property
    def devices(self) -> int:
        """On how many devices the recipe's machine trains."""
        return self._recipe.machine.devices

    @property
    def has_model(self) -> bool:
        """Whether the recipe has a model; it need not where every step names a folder of one."""
        return self._recipe.model is not None

    @cached_property
    def model(self) -> LlavaModel:
        """The model on the meta device: shapes without weights."""
        from llavakit.model.folder import sketch_model  # a recipe without a model needs no torch

        return sketch_model(self._recipe.parts(), self._registry)

    def parameters(self, part: str) -> int:
        """Return the number of parameters of `vision`, `connector` or `language`."""
        return count_parameters(getattr(self.model, part))

    def build(self, use: Use[KindT], /, **context: Any) -> KindT:
        """Return a component that a recipe chose, to ask it something."""
        return self._registry.build(use, **context)

    def trainable(self, part: str) -> int:
        """Return how many parameters of a part learn where it is trained: of LoRA, adapters."""
        return sum(parameter.numel() for _, parameter in getattr(self.model, part).trainable())

    def expect(self, use: Use[Dataset]) -> tuple[int, int] | None:
        """Return (samples, mean text tokens a sample) of a data set, where it can be known."""
        component = self._registry.get(Dataset, use.use)
        return component.expect(component.Options(**use.options))


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def make_plan(recipe: Recipe, registry: Registry) -> Plan:
    """Return the plan of a recipe. Raises LlavaError where its parts do not fit."""
    planner = Planner(recipe, registry)
    model = None if recipe.model is None else planner.model
    for name, use in recipe.active_steps():
        step = registry.get(Step, use.use)
        options = step.Options(**use.options)
        planner.steps[name] = step.plan(options, planner) or StepPlan()
    machine = recipe.machine
    rate, measured = machine.tflops, False
    if rate is None and any(step.tflop is not None for step in planner.steps.values()):
        from llavakit.engine.speed import measure_tflops

        rate, measured = measure_tflops(recipe.device), True
    return Plan(
        recipe=recipe.name,
        parts={} if model is None else _parts(model),
        visual_tokens=None if model is None else model.visual_tokens,
        steps=planner.steps,
        machine=machine,
        tflops=None if rate is None else rate * machine.devices,
        measured=measured,
    )


def _parts(model: LlavaModel) -> dict[str, PartPlan]:
    widths: Mapping[str, int] = {
        "vision": model.vision.width,
        "connector": model.language.width,
        "language": model.language.width,
    }
    return {
        name: PartPlan(
            component=getattr(model, name).name,
            parameters=count_parameters(getattr(model, name)),
            width=widths[name],
        )
        for name in PARTS
    }


def _count(value: int | None) -> str:
    if value is None:
        return "?"
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**4)):
        if value >= size:
            return f"{value / size if unit != 'k' else value / 1000:.3g}{unit}"
    return str(value)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return a table's lines: two columns of words, then numbers."""
    return aligned(rows, [column >= 2 for column in range(len(rows[0]))])
