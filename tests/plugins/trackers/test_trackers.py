"""Trackers against the libraries that read what they write: all of them watch one run.

events.jsonl says what was to be recorded.
"""

from __future__ import annotations

import csv
import json
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RECIPE

from llavakit import Tracker
from llavakit.cli import main
from llavakit.testing import TrackerContract
from llavakit_plugins.trackers.csv_file import CsvFile
from llavakit_plugins.trackers.mlflow import MLflow
from llavakit_plugins.trackers.series import Start, TrackerOptions
from llavakit_plugins.trackers.tensorboard import TensorBoard
from llavakit_plugins.trackers.trackio import Trackio
from llavakit_plugins.trackers.wandb import WandB

LIBRARIES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
needs = {
    name: pytest.mark.skipif(
        find_spec(module) is None,
        reason=f"{module} is not installed (pip install 'llavakit[{name}]')",
    )
    for name, module in LIBRARIES.items()
}
KEY = "0123456789abcdef0123456789abcdef01234567"
STEP = "02-finetune"

# what their libraries do at import or exit, by their own doing
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, backbones: Path, data: Path) -> Iterator[Path]:
    """The folder of a run that every tracker which is installed here has watched."""
    folder = tmp_path_factory.mktemp("tracked")
    text = RECIPE.format(seed=0, backbones=backbones, data=data, pretrain=data / "train.json")
    there = [name for name, module in LIBRARIES.items() if find_spec(module)]
    options = {"wandb": ', mode = "offline"', "mlflow": f', uri = "{folder}/mlruns"'}
    chosen = [f'{{ use = "{name}"{options[name]} }}' if name in options else f'"{name}"'
              for name in ("csv", *there)]  # fmt: skip
    head = f"trackers = [{', '.join(chosen)}]\n"
    recipe = folder / "tracked.toml"
    recipe.write_text(head + text.replace("epochs = 2", "max_steps = 3\nvalidate_every = 3\n"
        f'samples = 2\nheld_out = {{ use = "conversations", path = "{data}/train.json", '
        f'images = "{data}/images" }}'))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("WANDB_API_KEY", KEY)
        patch.chdir(folder)
        assert main([str(recipe), "--out", str(folder / "run"), "--set", "steps.1.skip=true"]) == 0
        yield folder / "run"


@pytest.fixture(scope="module")
def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def series(events: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(e["at"], e[name]) for e in events if name in e and e["event"] == "train"]


def test_the_run_tells_rates_lengths_memory_and_learning_rates_by_part(
    events: list[dict[str, Any]],
) -> None:
    trained = [event for event in events if event["event"] == "train"]
    assert len(trained) == 3
    for event in trained:
        assert event["lrs"] == {"connector": event["lr"], "language": event["lr"]}
        assert event["length"] == pytest.approx(
            event["tokens_per_s"] / event["samples_per_s"], rel=0.1
        )
        assert event["tflops"] > 0
        assert event["memory_gb"] > 0.05
        assert "mfu" not in event, "the peak of a CPU is not known"
    looks = [event for event in events if event["event"] == "validation"]
    for answer in looks[-1]["answers"]:
        assert {"id", "question", "answer", "truth", "image"} == set(answer)


def test_csv(run: Path, events: list[dict[str, Any]]) -> None:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(int(row["at"]), float(row["value"])) for row in rows
             if row["name"] == "loss" and row["at"]]  # fmt: skip
    assert found == series(events, "loss")
    assert {"lr_connector", "lr_language", "tokens_per_s", "held_out_loss"} <= {
        r["name"] for r in rows
    }
    (done,) = [event for event in events if event["event"] == "done"]
    last = {row["name"]: float(row["value"]) for row in rows if not row["at"]}
    assert last["steps"] == done["steps"] == 3


@needs["tensorboard"]
def test_tensorboard(run: Path, events: list[dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard" / STEP), {"images": 0, "scalars": 0})
    found.Reload()
    losses = [(s.step, s.value) for s in found.Scalars("loss")]
    assert losses == [(at, pytest.approx(loss)) for at, loss in series(events, "loss")]
    scalars = set(found.Tags()["scalars"])
    assert {"lr_connector", "lr_language", "length", "memory_gb", "tflops"} <= scalars
    assert found.Scalars("results/steps")[0].value == 3
    look = [event for event in events if event["event"] == "validation"][-1]
    told = look["answers"][0]
    (*_, text) = found.Tensors(f"answers/{told['id']}/text_summary")
    assert told["answer"] in text.tensor_proto.string_val[0].decode()
    (*_, image) = found.Images(f"images/{told['id']}")
    assert (image.height, image.step) == (40, 3)

    root = EventAccumulator(str(run / "tensorboard"))
    root.Reload()
    hparams = root.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.connector.use" in hparams
    assert b"steps.2.train.language" in hparams
    assert (run / "tensorboard" / STEP).is_dir()


@needs["mlflow"]
def test_mlflow(run: Path, events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client: Any = MlflowClient(tracking_uri=str(run.parent / "mlruns"))
    number = client.get_experiment_by_name("llavakit").experiment_id
    (found,) = client.search_runs([number])
    losses = client.get_metric_history(found.info.run_id, f"{STEP}/loss")
    assert sorted((m.step, m.value) for m in losses) == series(events, "loss")
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "small"
    assert found.data.params["model.connector.use"] == "mlp"
    assert found.data.metrics[f"{STEP}/results/steps"] == 3
    names = {a.path for a in client.list_artifacts(found.info.run_id, f"answers/{STEP}")}
    assert f"answers/{STEP}/s0.png" in names
    assert f"answers/{STEP}/00000003.txt" in names


def records(path: Path) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format, behind a head of seven bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no head fits into what is left of a block
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def named(items: Iterable[Any]) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@needs["wandb"]
def test_wandb_offline(run: Path, events: list[dict[str, Any]]) -> None:
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    history = list[dict[str, Any]]()
    config, summary = dict[str, Any](), dict[str, Any]()
    for data in records(file):
        record = protocol.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            config |= named(record.run.config.update)
        if record.HasField("history"):
            history.append(named(record.history.item))
        if record.HasField("summary"):
            summary |= named(record.summary.update)
    losses = [(row[f"{STEP}/at"], row[f"{STEP}/loss"]) for row in history if f"{STEP}/loss" in row]
    assert losses == series(events, "loss")
    assert config["model.connector.use"] == "mlp"
    assert summary[f"{STEP}/results/steps"] == 3
    shown = [row for row in history if f"{STEP}/images/count" in row]
    assert shown[-1][f"{STEP}/images/count"] == 2
    look = [event for event in events if event["event"] == "validation"][-1]
    captions = shown[-1][f"{STEP}/images/captions"]
    for answer, caption in zip(look["answers"], captions, strict=True):
        assert caption.startswith(answer["id"])
        assert answer["answer"] in caption


@needs["trackio"]
def test_trackio(run: Path, events: list[dict[str, Any]]) -> None:
    (file,) = (run.parent / "trackio").rglob("llavakit*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    found = [(step, json.loads(text)) for step, text in rows]
    losses = [(step, row[f"{STEP}/loss"]) for step, row in found if f"{STEP}/loss" in row]
    assert losses == series(events, "loss")
    assert any(f"{STEP}/results/steps" in row for _, row in found)
    assert list((run.parent / "trackio").rglob("*.png")), "images of answers"


def test_no_key_is_in_any_file(run: Path) -> None:
    for file in run.parent.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), file


# -- the contract ----------------------------------------------------------------------------------


class TestCsv(TrackerContract):
    def build(self) -> Tracker:
        return CsvFile(TrackerOptions())

    def recorded(self, tracker: Tracker, folder: Path) -> str:
        return (folder / "metrics.csv").read_text()


def test_a_half_line_of_csv_is_not_gone_on_from(tmp_path: Path) -> None:
    whole = "step,at,name,value\n01-finetune,1,loss,2.5\n"
    (tmp_path / "metrics.csv").write_text(whole + "01-fine")
    start = Start(tmp_path, "run", {}, "")
    with_csv = CsvFile(TrackerOptions())
    with_csv.start(start)
    with_csv.numbers("01-finetune", 1, {"loss": 2.5})
    assert (tmp_path / "metrics.csv").read_text() == whole + "01-finetune,1,loss,2.5\n"


@needs["tensorboard"]
class TestTensorBoard(TrackerContract):
    def build(self) -> Tracker:
        return TensorBoard(TrackerOptions())

    def recorded(self, tracker: Tracker, folder: Path) -> str:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder / "tensorboard" / "01-pretrain"))
        found.Reload()
        return str([scalar.value for scalar in found.Scalars("loss")])


@needs["mlflow"]
class TestMLflow(TrackerContract):
    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        self.uri = str(tmp_path / "mlruns")

    def build(self) -> Tracker:
        return MLflow(MLflow.Options(uri=self.uri))

    def recorded(self, tracker: Tracker, folder: Path) -> str:
        return " ".join(f.read_text() for f in Path(self.uri).rglob("metrics/01-pretrain/loss"))


@needs["wandb"]
class TestWandB(TrackerContract):
    patience = 60.0  # its service starts with the first run

    def build(self) -> Tracker:
        time.sleep(1.1)  # its offline folders are named by the second
        return WandB(WandB.Options(mode="offline"))

    def recorded(self, tracker: Tracker, folder: Path) -> str:
        texts = [""]
        for _ in range(100):  # a process of wandb's own writes the files, and may be behind
            files = (folder / "wandb").glob("offline-run-*/*.wandb")
            texts = [file.read_bytes().decode("latin-1") for file in files]
            if all("01-pretrain/loss" in text for text in texts):
                break
            time.sleep(0.1)
        return " ".join(texts)


@needs["trackio"]
class TestTrackio(TrackerContract):
    patience = 60.0

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def build(self) -> Tracker:
        return Trackio(Trackio.Options())

    def recorded(self, tracker: Tracker, folder: Path) -> None:
        return None  # several projects share what the library read at import: where it keeps them


def test_a_library_that_is_absent_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavakit_plugins.trackers import series

    monkeypatch.setattr(series, "find_spec", lambda _: None)
    for tracker in (TensorBoard, WandB, MLflow, Trackio):
        said = tracker.missing(tracker.Options())
        assert said is not None
        assert f"pip install 'llavakit[{tracker.name}]'" in said
    assert CsvFile.missing(CsvFile.Options()) is None
