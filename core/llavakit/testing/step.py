"""The contract of a step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llavakit.contracts.component import Use
from llavakit.contracts.networks import LanguageModel, VisionEncoder
from llavakit.contracts.run import Outcome, ProcessGroup, Run, Step, Stopped
from llavakit.model.llava import LlavaModel
from llavakit.registry import Registry
from llavakit.testing.contract import Contract


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
        looks = iter(range(1, 10**9))
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
                stopping=lambda: stop_at is not None and next(looks) >= stop_at,
                process_group=ProcessGroup(),
            )
        )
        return outcome, events.seen

    def test_it_reports_numbers_and_sections(self, tmp_path: Path) -> None:
        outcome, events = self.start(tmp_path / "step")
        for name, value in outcome.metrics.items():
            assert isinstance(value, int | float), f"{name} is no number"
            assert math.isfinite(value), f"{name} is {value}"
        for section in outcome.sections:
            json.dumps(section.model_dump(mode="json"))
        for event in events:
            json.dumps(event)

    def test_the_same_seed_gives_the_same_numbers(self, tmp_path: Path) -> None:
        first, _ = self.start(tmp_path / "first")
        second, _ = self.start(tmp_path / "second")
        assert dict(first.metrics) == dict(second.metrics), "its result is not its seed's alone"

    def test_stopped_and_resumed_it_arrives_at_the_same_numbers(self, tmp_path: Path) -> None:
        whole, _ = self.start(tmp_path / "whole")
        for look in (1, 2):
            folder = tmp_path / f"stopped-{look}"
            try:
                self.start(folder, stop_at=look)
            except Stopped:
                resumed, _ = self.start(folder, resume=True)
                assert dict(resumed.metrics) == dict(whole.metrics)

    def test_it_writes_into_its_own_folder_only(self, tmp_path: Path) -> None:
        self.start(tmp_path / "step")
        written = sorted(path.name for path in tmp_path.iterdir())
        assert written == ["step"], f"it writes outside of `run.directory`: {written}"
