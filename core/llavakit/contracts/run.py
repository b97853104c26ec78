"""What a step is, what it is given, and what it reports."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar

from pydantic import BaseModel

from llavakit.contracts.component import Component, KindT_co, Use
from llavakit.contracts.model import LlavaModel
from llavakit.contracts.sections import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llavakit.contracts.networks import LanguageModel, VisionEncoder

T = TypeVar("T")
Stopping: TypeAlias = Callable[[], bool]  #: Says whether the user asked to stop.


class ProcessGroup:
    """One process among those of its run; here it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes, reports and does what needs one only."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return the leader's value in every process."""
        return value

    def any(self, flag: bool) -> bool:
        """Say in every process whether it is so in any of them."""
        return flag

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over the processes, written into it."""
        return tensor


class Build(Protocol):
    """Builds what a recipe chose: `build(self.options.data)` is a `Dataset`."""

    def __call__(self, use: Use[KindT_co], /, **context: Any) -> KindT_co: ...


class Progress(Protocol):
    """Shows how far a step is, with the time left; call it as often as you like.

    A total of 0 or less is unknown; another total, or a smaller `done`, begins another phase.
    """

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class Run:
    """What a step is given."""

    directory: Path  #: A folder of its own; whatever it leaves there is its artifact.
    earlier: Mapping[str, Path]  #: The folders of the steps before it, by name, oldest first.
    build: Build
    seed: int
    resume: bool  #: Whether to go on from what an interrupted attempt left in `directory`.
    find_device: Callable[[], torch.device]
    model: ModelSource
    progress: Progress
    event: Event
    stopping: Stopping  #: Says whether the user asked to stop: save, then raise `Stopped`.
    process_group: ProcessGroup  #: one process unless the step is `together`

    @property
    def device(self) -> torch.device:
        """Where networks run; torch is imported when a step asks for it."""
        return self.find_device()  # only now: it takes torch, and memory of a GPU


class Event(Protocol):
    """Appends an event to events.jsonl and shows it to the trackers."""

    def __call__(self, name: str, /, **values: Any) -> None: ...


class ModelSource(Protocol):
    """The model as it stands before a step: the newest one an earlier step left, else new."""

    @property
    def vision(self) -> Use[VisionEncoder]:
        """The recipe's choice. Raises RecipeError where it has no model."""

    @property
    def language(self) -> Use[LanguageModel]:
        """The recipe's choice. Raises RecipeError where it has no model."""

    def __call__(self, folder: Path | None = None, **given: Any) -> LlavaModel:
        """Return the model in `folder`, or as the recipe and the earlier steps have it.

        `folder` and `given` are what `llavakit.load` takes: any layout, or a name on the hub.
        """

    def new(
        self, vision: VisionEncoder | None = None, language: LanguageModel | None = None
    ) -> LlavaModel:
        """Return the recipe's model around parts that were made elsewhere."""


class Stopped(Exception):
    """A step stopped because it was asked to, after saving what it had."""


@dataclass(frozen=True)
class Outcome:
    """What a step reports: numbers, and sections for the run's report."""

    metrics: Mapping[str, float]
    sections: Sequence[Section] = ()


class Step(Component):
    """One thing a recipe does. Built as `Step(options)`."""

    hook = "llava_steps"
    needs_model: ClassVar[bool] = False
    """Whether it starts from the recipe's model: missing weights, or a device, are told at once."""
    together: ClassVar[bool] = False
    """Whether all of `run.process_group` take part; only its main one writes to the folder."""

    @classmethod
    def leaves(cls, options: Any) -> Mapping[str, bool] | None:
        """Return the model folders that it leaves in its own, and which can be trained on.

        Later steps start from `model`, where it is one of them. None: not known before it runs.
        """
        return None if cls.needs_model else {}  # what starts from a model may change it

    @abstractmethod
    def run(self, run: Run) -> Outcome:
        """Do the work, write it to `run.directory`, and report."""

    @classmethod
    def plan(cls, options: Any, planner: Planner) -> StepPlan | None:
        """Return what the step will cost, without loading anything; None where negligible."""
        return None


class StepPlan(BaseModel):
    """What one step will cost. None: not known before it runs."""

    samples: int | None = None
    tokens: int | None = None  #: Rows of the packed stream, over all epochs.
    steps: int | None = None  #: Optimisation steps.
    tflop: float | None = None  #: Necessary work in 10^12 floating-point operations.
    memory_gb: float | None = None  #: Of a device: weights, gradients, optimiser, activations.
    memory: dict[str, float] = {}  #: The same by what takes it, in GB.
    trained: tuple[str, ...] = ()
    cost_usd: float | None = None  #: What services will charge, as far as it can be known before.
    note: str = ""


class Planner(Protocol):
    """What a step's `plan` may ask."""

    @property
    def steps(self) -> Mapping[str, StepPlan]:
        """The plans of the steps before, by name."""

    @property
    def seed(self) -> int:
        """The recipe's seed, which the run will have."""

    @property
    def devices(self) -> int:
        """On how many devices the recipe's machine trains."""

    def start(self, init: Path | None, change: Callable[[Any], Any] = ..., **given: Any) -> None:
        """Have `model` be that of a step's option `init`, loaded with what is `given`, changed."""

    @property
    def has_model(self) -> bool:
        """Whether it is known which model the step starts from."""

    @property
    def model(self) -> LlavaModel:
        """The model that the step starts from, on the meta device: shapes without weights."""

    def parameters(self, part: str) -> int:
        """Return the number of parameters of `vision`, `connector` or `language`."""

    def trainable(self, part: str) -> int:
        """Return how many parameters of a part learn where it is trained: of LoRA, adapters."""

    def build(self, use: Use[KindT_co], /, **context: Any) -> KindT_co:
        """Return a component that a recipe chose, to ask it something."""

    def expect(self, use: Use[Any]) -> tuple[int, int] | None:
        """Return (samples, mean text tokens a sample) of a data set, where it can be known."""
