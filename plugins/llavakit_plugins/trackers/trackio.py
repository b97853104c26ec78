"""The tracker `trackio`: a run of Trackio, in its database on this machine (TRACKIO_DIR).

trackio show --project llavakit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llavakit_plugins.trackers.series import Answer, SeriesTracker, Start, TrackerOptions


class TrackioOptions(TrackerOptions):
    project: str = "llavakit"
    name: str | None = None
    """The run's name; the recipe's, and a few characters that tell it from others, by default."""


class Trackio(SeriesTracker):
    """Numbers `02-finetune/loss` over optimisation steps, the recipe as config, answers."""

    name = "trackio"
    library = ("trackio", "trackio")
    Options = TrackioOptions
    options: TrackioOptions

    def __init__(self, options: TrackioOptions) -> None:
        super().__init__(options)
        import trackio  # in the main thread: see TensorBoard

        self._trackio: Any = trackio
        self._run: Any = None

    def start(self, start: Start) -> None:
        from uuid import uuid4

        name = self.options.name or f"{start.name}-{uuid4().hex[:6]}"
        self._run = self._trackio.init(
            project=self.options.project,
            name=self.same_run(start.folder, name),
            config=dict(start.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def numbers(self, step: str, at: int, numbers: Mapping[str, float]) -> None:
        self._log(step, at, numbers)

    def answers(self, step: str, at: int, answers: Sequence[Answer]) -> None:
        text = "\n\n".join(f"{answer.id}\n{answer.text}" for answer in answers)
        values: dict[str, Any] = {"answers": self._trackio.Markdown(text)}
        for answer in answers if self.options.images else ():
            if (image := answer.thumbnail()) is not None:
                values[f"images/{answer.id}"] = self._trackio.Image(image, caption=answer.text)
        self._log(step, at, values)

    def results(self, step: str, numbers: Mapping[str, float]) -> None:
        self._log(step, 0, {f"results/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _log(self, step: str, at: int, values: Mapping[str, Any]) -> None:
        self._run.log({f"{step}/{name}": value for name, value in values.items()}, step=at)
