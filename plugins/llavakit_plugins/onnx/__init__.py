"""ONNX: the exporter, and a runtime without torch."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_exporters() -> Mapping[str, str]:
    return {
        "onnx": "llavakit_plugins.onnx.exporter.exporter:Onnx",
    }
