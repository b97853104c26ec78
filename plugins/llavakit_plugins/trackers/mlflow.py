"""The tracker `mlflow`: a run in MLflow's store, on a server or in files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from llavakit import write_text
from llavakit_plugins.trackers.series import Answer, SeriesTracker, Start, TrackerOptions

_SAME_RUN = ".mlflow-run"  # in the run's folder: a resumed run goes on with it
_LONGEST = 500  # characters of a parameter's value, for older servers


class MLflowOptions(TrackerOptions):
    uri: str | None = None
    """The store: a server's address, or a folder. By default MLFLOW_TRACKING_URI, else mlruns."""
    experiment: str = "llavakit"
    name: str | None = None
    """The run's name in MLflow; the recipe's by default."""


class MLflow(SeriesTracker):
    """Metrics `02-finetune/loss`, parameters from the recipe, answers as text and images."""

    name = "mlflow"
    library = ("mlflow", "mlflow")
    Options = MLflowOptions
    options: MLflowOptions

    def __init__(self, options: MLflowOptions) -> None:
        super().__init__(options)
        uri = options.uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns"
        if "://" not in uri:  # files, which MLflow keeps reading but wants to be told so
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # of what is used, to its makers
        from mlflow import MlflowClient  # in the main thread: see TensorBoard

        self._client: Any = MlflowClient(tracking_uri=uri)
        self._run: str | None = None

    def start(self, start: Start) -> None:
        known = start.folder / _SAME_RUN
        if known.is_file():
            self._run = known.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(self.options.experiment)
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(self.options.experiment)
        )
        run = self._client.create_run(number, run_name=self.options.name or start.name)
        self._run = run.info.run_id
        # at once, before parameters are sent: a run that is stopped here goes on as the same one
        write_text(known, f"{self._run}\n")
        for key, value in start.settings.items():
            self._client.log_param(self._run, key, str(value)[:_LONGEST])
        if start.recipe:
            self._client.log_text(self._run, start.recipe, "recipe.toml")

    def numbers(self, step: str, at: int, numbers: Mapping[str, float]) -> None:
        self._log({f"{step}/{name}": value for name, value in numbers.items()}, at)

    def answers(self, step: str, at: int, answers: Sequence[Answer]) -> None:
        text = "\n\n".join(f"{answer.id}\n{answer.text}" for answer in answers)
        self._client.log_text(self._run, text, f"answers/{step}/{at:08}.txt")
        for answer in answers if self.options.images and at == 0 else ():
            if (image := answer.thumbnail()) is not None:
                self._client.log_image(self._run, image, f"answers/{step}/{_plain(answer.id)}.png")

    def results(self, step: str, numbers: Mapping[str, float]) -> None:
        self._log({f"{step}/results/{name}": value for name, value in numbers.items()}, 0)

    def close(self) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run)

    def _log(self, numbers: Mapping[str, float], at: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics: Any = [Metric(name, value, now, at) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=metrics)


def _plain(text: str) -> str:
    """Return what may name a file."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)[:100]
