"""What a run will cost, before anything is loaded: parameters, tokens, memory, time, money."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llavakit.contracts.component import Use
from llavakit.contracts.errors import RecipeError
from llavakit.contracts.interfaces import Dataset
from llavakit.contracts.run import Step, StepPlan
from llavakit.recipe.model_choice import PARTS
from llavakit.recipe.recipe import Machine, Recipe, StepUse, missing_model
from llavakit.registry import KindT, Registry
from llavakit.registry.entry_points import only

if TYPE_CHECKING:
    from torch import nn

    from llavakit.model.llava import LlavaModel


class PartPlan(BaseModel):
    """One component of the model."""

    component: str
    parameters: int
    width: int


class Plan(BaseModel):
    """What `--plan` prints and plan.json holds."""

    recipe: str
    own_model: bool = True  #: Whether `parts` are the recipe's [model]; else its steps' start.
    parts: dict[str, PartPlan]
    visual_tokens: int | None  #: Of an image of 640 x 480 pixels; None where no model is known.
    steps: dict[str, StepPlan]
    machine: Machine
    tflops: float | None  #: Rate reckoned with, of all devices; None: nothing to reckon.
    measured: bool  #: Whether that rate was measured on this machine just now.


class RecipePlanner:
    """Answers what a step's `plan` asks: see `llavakit.contracts.run.Planner`."""

    def __init__(self, recipe: Recipe, registry: Registry, sketch: Any = None) -> None:
        self._recipe, self._registry, self._sketch = recipe, registry, sketch
        self.steps: dict[str, StepPlan] = {}  #: The plans of the steps before, by name.
        self._newest: _Known = lambda: self._of_recipe
        self._current: _Known = self._newest
        self._left: dict[str, tuple[Mapping[str, bool] | None, _Known]] = {}

    def plan(self, name: str, use: StepUse) -> None:
        """Add a step's plan to those of the steps before."""
        step = self._registry.get(Step, use.use)
        options = self._registry.options(use)
        self._current = self._newest
        self.steps[name] = step.plan(options, self) or StepPlan()
        for step_name in (name, use.use):
            self._left[step_name] = step.leaves(options), self._current
        if "model" in (step.leaves(options) or {}):
            self._newest = self._current

    @property
    def seed(self) -> int:
        return self._recipe.seed

    @property
    def devices(self) -> int:
        return self._recipe.machine.devices

    def start(
        self, init: Path | None, change: Callable[[Any], Any] = lambda model: model, **given: Any
    ) -> None:
        if init is None:  # it stays the newest that a step before left, or else the recipe's
            return
        name, _, folder = init.as_posix().partition("/")
        folders, left = self._left.get(name[1:], (None, lambda: None))
        if name.startswith("@") and folders is not None and folder not in folders:
            known = f": it leaves {', '.join(folders)}" if folders else ""
            raise RecipeError(f"`init`: step `{name[1:]}` leaves no model `{folder}`{known}")

        @cache  # a step asks often, and a sketch takes seconds
        def found() -> LlavaModel | None:
            if not name.startswith("@"):
                from llavakit.model.load import sketch_any

                model = sketch_any(init, self._registry, **given)
            elif folders is not None and not folders[folder]:
                raise RecipeError(f"`init`: {init} can be run, but no step can go on from it")
            else:
                model = left()
            return None if model is None else change(deepcopy(model))  # others reckon with it, too

        self._current = found

    @property
    def has_model(self) -> bool:
        return self._current() is not None

    @property
    def model(self) -> LlavaModel:
        if (model := self._current()) is None:
            raise RecipeError(
                f"recipe `{self._recipe.name}` has no [model], but one of its steps needs one; add "
                "it, or state `init`"
            )
        return model

    @cached_property
    def _of_recipe(self) -> Any:  # a LlavaModel, what `sketch` has for one, or None
        if (model := self._recipe.model) is None or self._sketch is not None:  # without torch
            return None if model is None else self._sketch(model, self._registry)
        from llavakit.model.folder import sketch_model

        return sketch_model(model, self._registry)

    def parameters(self, part: str) -> int:
        return count_parameters(getattr(self.model, part))

    def build(self, use: Use[KindT], /, **context: Any) -> KindT:
        return self._registry.build(use, **{**context, "shapes": True})

    def trainable(self, part: str) -> int:
        return sum(parameter.numel() for _, parameter in getattr(self.model, part).trainable())

    def expect(self, use: Use[Dataset]) -> tuple[int, int] | None:
        return self._registry.chosen(use).expect(self._registry.options(use))


_Known = Callable[[], "LlavaModel | None"]


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def make_plan(recipe: Recipe, registry: Registry, sketch: Callable[..., Any] | None = None) -> Plan:
    """Return a recipe's plan, its shapes by `sketch`. Raises LlavaError where parts do not fit."""
    planner = RecipePlanner(recipe, registry, sketch)
    model = planner.model if recipe.model is not None else None
    if model is None and (problem := next(missing_model(recipe.steps, registry), None)):
        raise RecipeError(f"recipe `{recipe.name}`: {problem.message}: {problem.hint}")
    for name, use in recipe.active_steps():
        planner.plan(name, use)
        if model is None and planner.steps[name].trained and planner.has_model:
            model = planner.model
    machine = recipe.machine
    rate, measured = machine.tflops, False
    if rate is None and any(step.tflop is not None for step in planner.steps.values()):
        rate, measured = only("llavakit.measures", "tflops")(recipe.device), True
    return Plan(
        recipe=recipe.name,
        own_model=recipe.model is not None,
        parts={} if model is None else _parts(model),
        visual_tokens=None if model is None else len(model.views.of().index_RK),
        steps=planner.steps,
        machine=machine,
        tflops=None if rate is None else rate * machine.devices,
        measured=measured,
    )


def _parts(model: LlavaModel) -> dict[str, PartPlan]:
    found = {}
    for name in PARTS:
        part = getattr(model, name)
        width = (model.language if name == "connector" else part).width
        found[name] = PartPlan(component=part.name, parameters=count_parameters(part), width=width)
    return found
