"""Exporters: other layouts of a model."""

from __future__ import annotations

from llavakit import Exporter, hookimpl


@hookimpl
def llava_exporters() -> list[type[Exporter]]:
    from llavakit_plugins.exporters.hf import Hf
    from llavakit_plugins.exporters.onnx.exporter import Onnx
    from llavakit_plugins.exporters.original import Original

    return [Hf, Onnx, Original]
