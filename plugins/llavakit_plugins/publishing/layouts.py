"""The folder that is sent: a model in the layouts that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llavakit import Exporter, LlavaModel


def lay_out(model: LlavaModel, exporters: Sequence[Exporter], folder: Path) -> dict[str, str]:
    """Write the first layout to `folder` itself, each other one to a folder of its name in it.

    What an attempt before this one has written is kept: each layout is whole or not there.
    Returns the folder of each layout within `folder`, "" for itself.
    """
    merged, layouts = None, dict[str, str]()
    for number, exporter in enumerate(exporters):
        layouts[exporter.name] = exporter.name if number else ""
        place = folder / layouts[exporter.name]
        if not place.exists():
            merged = model.merged() if merged is None else merged
            exporter.export(merged, place)
    return layouts
