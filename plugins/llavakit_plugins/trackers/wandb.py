"""The tracker `wandb`: a run of Weights & Biases, online or in files to be sent later.

Its key is `WANDB_API_KEY`, or what `wandb login` keeps; no recipe holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from uuid import uuid4

from llavakit_plugins.trackers.series import Answer, SeriesTracker, Start, TrackerOptions


class WandBOptions(TrackerOptions):
    project: str = "llavakit"
    entity: str | None = None
    """The user or team; the account's own by default."""
    name: str | None = None
    """The run's name; the recipe's by default."""
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] | None = None
    """By default WANDB_MODE, else online. `wandb sync` sends an offline run later."""


class WandB(SeriesTracker):
    """Numbers `02-finetune/loss` over `02-finetune/at`, the recipe as config, answers as images."""

    name = "wandb"
    library = ("wandb", "wandb")
    Options = WandBOptions
    options: WandBOptions

    def __init__(self, options: WandBOptions) -> None:
        super().__init__(options)
        import wandb  # in the main thread: see TensorBoard

        self._wandb: Any = wandb
        self._run: Any = None
        self._steps: set[str] = set()

    def start(self, start: Start) -> None:
        self._run = self._wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            name=self.options.name or start.name,
            tags=list(self.options.tags),
            mode=self.options.mode,
            id=self.same_run(start.folder, uuid4().hex[:8]),
            resume="allow",
            dir=str(start.folder),
            config=dict(start.settings),
            # neither the terminal nor the user's code are sent, and nothing is said on the terminal
            settings=self._wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False
            ),
        )

    def numbers(self, step: str, at: int, numbers: Mapping[str, float]) -> None:
        self._log(step, at, numbers)

    def answers(self, step: str, at: int, answers: Sequence[Answer]) -> None:
        shown = []
        for answer in answers if self.options.images else ():
            if (image := answer.thumbnail()) is not None:
                shown.append(self._wandb.Image(image, caption=f"{answer.id}\n{answer.text}"))
        rows = [[answer.id, answer.text] for answer in answers]
        table = self._wandb.Table(columns=["sample", "said"], data=rows)
        self._log(step, at, {"answers": table, **({"images": shown} if shown else {})})

    def results(self, step: str, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._run.summary[f"{step}/results/{name}"] = value

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _log(self, step: str, at: int, values: Mapping[str, Any]) -> None:
        if step not in self._steps:  # each step counts its optimisation steps from 0
            self._steps.add(step)
            self._run.define_metric(f"{step}/*", step_metric=f"{step}/at")
        self._run.log({f"{step}/at": at, **{f"{step}/{n}": v for n, v in values.items()}})
