"""The contract of a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llavakit.contracts.component import Use
from llavakit.contracts.networks import LanguageModel, VisionEncoder
from llavakit.contracts.run import Outcome, ProcessGroup, Run, Step, Stopped
from llavakit.model.folder import load_model
from llavakit.model.llava import LlavaModel
from llavakit.recipe.model_choice import is_model
from llavakit.registry import Registry
from llavakit.testing.contract import Contract, hold, holding


@dataclass
class _Models:
    """The model before the step, as the contract's `model` gives it."""

    contract: StepContract
    vision: Use[VisionEncoder] = field(init=False)
    language: Use[LanguageModel] = field(init=False)

    def __call__(self, folder: Path | None = None, **given: Any) -> LlavaModel:
        return self.contract.model()

    def new(
        self, vision: VisionEncoder | None = None, language: LanguageModel | None = None
    ) -> LlavaModel:
        return self.contract.model()


@dataclass
class _Events:
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, name: str, /, **values: Any) -> None:
        self.seen.append({"event": name, **values})


class StepContract(Contract[Step]):
    """Checks a `Step` that takes a second or two."""

    kind = Step
    stops: bool = True
    """Whether it can be stopped on the way: one that takes long looks at `run.stopping`."""
    close: float = 0.0  #: How far the numbers of a resumed run may be from those of a whole one.
    shared: tuple[str, ...] = ()  #: Folders beside its own in which it keeps what later steps take.

    def model(self) -> LlavaModel:
        """Return the model before the step, the same each time, where it asks for one."""
        raise AssertionError(f"{type(self).__name__} gives no `model`, but the step asks for one")

    def earlier(self) -> Mapping[str, Path]:
        """Return the folders of earlier steps."""
        return {}

    def start(
        self, folder: Path, *, resume: bool = False, stop_at: int | None = None
    ) -> tuple[Outcome, list[dict[str, Any]]]:
        """Run the step in `folder`; with `stop_at`, ask it to stop at that look at `stopping`."""
        folder.mkdir(exist_ok=True)
        self.looks = 0

        def stopping() -> bool:
            self.looks += 1
            return stop_at is not None and self.looks >= stop_at

        events = _Events()
        outcome = self.build().run(
            Run(
                directory=folder,
                earlier=self.earlier(),
                build=partial(Registry.installed().build, steps=self.earlier()),
                seed=0,
                resume=resume,
                find_device=lambda: torch.device("cpu"),
                model=_Models(self),
                progress=lambda done, total, note="": None,
                event=events,
                stopping=stopping,
                process_group=ProcessGroup(),
            )
        )
        return outcome, events.seen

    def test_it_reports_numbers_and_sections(self, tmp_path: Path) -> None:
        outcome, events = self.start(tmp_path / "step")
        hold(
            isinstance(outcome, Outcome),
            "`run` returns an Outcome", type(outcome).__name__, "return Outcome({...})",
        )  # fmt: skip
        for name, value in outcome.metrics.items():
            hold(
                isinstance(value, int | float) and math.isfinite(value),
                "every metric is a finite number", f"{name} is {value!r}",
                "turn it to a float, and leave out what was not counted",
            )  # fmt: skip
        with holding("sections and events are plain data, which JSON keeps", "use texts for paths"):
            for section in outcome.sections:
                json.dumps(section.model_dump(mode="json"))
            for event in events:
                json.dumps(event)

    def test_the_same_seed_gives_the_same_numbers(self, tmp_path: Path) -> None:
        first, _ = self.start(tmp_path / "first")
        second, _ = self.start(tmp_path / "second")
        self._same(
            first, second, tmp_path / "first", tmp_path / "second",
            "its result is its seed's alone", "draw with generators seeded by `run.seed`",
        )  # fmt: skip

    def test_it_can_be_stopped(self, tmp_path: Path) -> None:
        if not self.stops:
            return
        change = (
            "ask `run.stopping()` in the loop; where it says True, save and raise Stopped. One "
            "that takes no time says `stops = False` in its contract"
        )
        try:
            self.start(tmp_path / "step", stop_at=1)
        except Stopped:
            return
        asked = f"after {self.looks} looks" if self.looks else "it never looks at `run.stopping`"
        hold(False, "asked to stop, it raises Stopped", f"it went on to the end: {asked}", change)

    def test_stopped_and_resumed_it_arrives_at_the_same_numbers(self, tmp_path: Path) -> None:
        change = (
            "save at a stop all that the rest depends on (weights, optimiser, position, random "
            "state), and go on from the newest that was saved where `run.resume` is True"
        )
        whole, _ = self.start(tmp_path / "whole")
        for stops in ((1,), (2,), (3,), (2, 1), (1, 2, 1), (2, 2)):
            folder = tmp_path / f"stopped-{'-'.join(map(str, stops))}"
            stopped = [
                self._stopped(folder, stop, resume=number > 0) for number, stop in enumerate(stops)
            ]
            if not stopped[-1]:
                continue  # it came to its end before that
            resumed, _ = self.start(folder, resume=True)
            times = " and ".join(map(str, stops))
            self._same(
                whole, resumed, tmp_path / "whole", folder,
                f"stopped at look {times} and resumed, it arrives where an unbroken run does",
                change,
            )  # fmt: skip

    def _stopped(self, folder: Path, look: int, *, resume: bool) -> bool:
        try:
            self.start(folder, resume=resume, stop_at=look)
        except Stopped:
            return True
        return False

    def test_it_leaves_the_models_it_says(self, tmp_path: Path) -> None:
        step = self.build()
        with holding("`leaves` says which model folders it leaves", "fix `leaves`"):
            left = type(step).leaves(self.stated())
        folder = tmp_path / "step"
        self.start(folder)
        for name in left or {}:
            hold(
                is_model(folder / name),
                f"it leaves a model folder `{name}`, as `leaves` says: later steps start from it",
                f"{name} holds {_listed(folder / name) or 'nothing'}; the step's folder "
                f"{sorted(_listed(folder))[:5]}",
                f"write it (`llavakit.save_model(model, run.directory / '{name}')`), or say in "
                "`leaves` that there is none",
            )
            with holding(f"the model in `{name}` can be loaded", "save it whole"):
                load_model(folder / name, Registry.installed())
        if left is not None and "model" not in left:
            hold(
                not is_model(folder / "model"),
                "`leaves` names the model that it leaves", "`model` is there, and not named",
                "return {'model': True} from `leaves`",
            )  # fmt: skip

    def test_it_writes_into_its_own_folder_only(self, tmp_path: Path) -> None:
        change = "write below `run.directory` alone, with whole paths"
        before = {name: _listed(path) for name, path in self.earlier().items()}
        room, elsewhere = tmp_path / "room", tmp_path / "elsewhere"
        room.mkdir()
        elsewhere.mkdir()
        with _working_in(elsewhere):
            self.start(room / "step")
        kept = ("step", *self.shared)
        written = sorted(path.name for path in room.iterdir() if path.name not in kept)
        hold(not written, "it writes into `run.directory` only", f"beside it: {written}", change)
        written = sorted(path.name for path in elsewhere.iterdir())
        hold(
            not written, "it writes nothing into the working directory", f"there: {written}", change
        )
        for name, path in self.earlier().items():
            hold(
                _listed(path) == before[name],
                "folders of earlier steps stay as they are", f"`{name}` was changed", change,
            )  # fmt: skip

    def _same(
        self, whole: Outcome, other: Outcome, one: Path, two: Path, promise: str, change: str
    ) -> None:
        for name in {**whole.metrics, **other.metrics}:
            first, second = (dict(o.metrics).get(name) for o in (whole, other))
            near = None not in (first, second) and math.isclose(
                first or 0, second or 0, rel_tol=self.close, abs_tol=self.close
            )
            hold(near, promise, f"{name} is {second}, not {first}", change)
        for file in sorted(one.glob("*/**/*.safetensors")):
            if not any(is_model(folder) for folder in file.parents):
                continue  # a checkpoint is the step's own affair
            part = file.relative_to(one)
            if not (two / part).is_file():
                hold(False, promise, f"{part} is missing", change)
            mine, theirs = load_file(file), load_file(two / part)
            for key, weight in mine.items():
                apart = (weight.double() - theirs[key].double()).abs().max().item()
                hold(
                    apart <= self.close, promise, f"{key} of {part} differs by {apart:.3g}", change
                )


def _listed(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the files below a folder with size and time of change."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
