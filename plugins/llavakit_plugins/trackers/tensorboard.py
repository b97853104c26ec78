"""The tracker `tensorboard`: event files below the run's folder, one run of TensorBoard a step.

tensorboard --logdir runs/mine/tensorboard       # or runs, to compare runs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llavakit_plugins.trackers.series import Answer, SeriesTracker, Start, TrackerOptions, Value

if TYPE_CHECKING:
    from pathlib import Path


class TensorBoard(SeriesTracker):
    """Scalars, answers with their images, and at the end the recipe's settings as HPARAMS."""

    name = "tensorboard"
    library = ("tensorboard", "tensorboard")
    Options = TrackerOptions

    def __init__(self, options: TrackerOptions) -> None:
        super().__init__(options)
        # imported here, in the main thread: workers are forked later, perhaps during an import
        from torch.utils.tensorboard import SummaryWriter

        self._make: Any = SummaryWriter
        self._root: Path | None = None
        self._settings: Mapping[str, Value] = {}
        self._writers: dict[str, Any] = {}
        self._results: dict[str, float] = {}

    def start(self, start: Start) -> None:
        self._root, self._settings = start.folder / "tensorboard", start.settings
        # four spaces make a block of code in Markdown, which TensorBoard's text panel reads
        fenced = "\n".join(f"    {line}" for line in start.recipe.splitlines())
        self._writer("").add_text("recipe", fenced)

    def numbers(self, step: str, at: int, numbers: Mapping[str, float]) -> None:
        writer = self._writer(step)
        for name, value in numbers.items():
            writer.add_scalar(name, value, at)

    def answers(self, step: str, at: int, answers: Sequence[Answer]) -> None:
        import numpy as np

        writer = self._writer(step)
        for answer in answers:
            writer.add_text(f"answers/{answer.id}", answer.text.replace("\n", "  \n"), at)
            image = answer.thumbnail() if self.options.images else None
            if image is not None:
                writer.add_image(f"images/{answer.id}", np.asarray(image), at, dataformats="HWC")

    def results(self, step: str, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer(step).add_scalar(f"results/{name}", value)
            self._results[f"{step}/{name}"] = value

    def close(self) -> None:
        if self._results:
            root = self._writer("")
            root.add_hparams(dict(self._settings), self._results, run_name=".")
        for writer in self._writers.values():
            writer.close()

    def _writer(self, step: str) -> Any:
        if step not in self._writers:
            assert self._root is not None
            self._writers[step] = self._make(str(self._root / step))
        return self._writers[step]
