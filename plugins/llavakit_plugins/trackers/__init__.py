"""Trackers that others' tools read: TensorBoard, Weights & Biases, MLflow, Trackio, CSV."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_trackers() -> Mapping[str, str]:
    room = "llavakit_plugins.trackers"
    return {
        "csv": f"{room}.csv_file:CsvFile",
        "mlflow": f"{room}.mlflow:MLflow",
        "tensorboard": f"{room}.tensorboard:TensorBoard",
        "trackio": f"{room}.trackio:Trackio",
        "wandb": f"{room}.wandb:WandB",
    }
