"""Exporters: other layouts of a model."""

from __future__ import annotations

from llavakit import Exporter, hookimpl


@hookimpl
def llava_exporters() -> list[type[Exporter]]:
    from llavakit_plugins.exporters.onnx.exporter import Onnx

    return [Onnx]
