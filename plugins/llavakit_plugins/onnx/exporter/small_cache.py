"""Writes a second decoder beside the first one: with a key-value cache of 8 bits, and no weights.

Clients that hand over a cache in float run the first; our own runtime on a CPU runs the second,
whose weights are places in the first one's file. So both take the disk of one, and half a file of
packed weights need not be parsed to be loaded.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx.external_data_helper import set_external_data

from llavakit_plugins.onnx.exporter.cache import quantise
from llavakit_plugins.onnx.runtime.layout import DECODER, SMALL_CACHE, graph_file

if TYPE_CHECKING:
    from llavakit_plugins.onnx.exporter.cache import Scales
    from llavakit_plugins.onnx.runtime.layout import Precision

BESIDE: tuple[Precision, ...] = ("q4",)
"""Precisions for those who want a small and fast model: they have the second decoder by default."""
_SMALLEST = 1024
"""Bytes from which a table is read from the other file."""


def write_beside(folder: Path, precision: Precision, scales: Scales) -> None:
    """Write the second decoder of a folder with the first."""
    model = _without_weights(folder / graph_file(DECODER, precision))
    onnx.save_model(quantise(model, scales), folder / graph_file(SMALL_CACHE, precision))


def _without_weights(path: Path) -> onnx.ModelProto:
    """Return the graph in a file, whose packed weights are places in this file.

    Only tables of bytes are: numbers of two or four bytes would have to lie at multiples of that.
    """
    model = onnx.load(path, load_external_data=False)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = 0
        for table in model.graph.initializer:
            raw = table.raw_data
            if table.data_type != onnx.TensorProto.UINT8 or len(raw) < _SMALLEST:
                continue  # or it lies in a file of its own, and has no `raw_data`
            # tables stand in this order; equal bytes further on are as good
            place = content.find(raw, end)
            end = place + len(raw)
            set_external_data(table, path.name, offset=place, length=len(raw))
            table.ClearField("raw_data")
    return model
