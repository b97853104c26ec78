"""Finds out whether this CPU's products of 8-bit numbers are exact in onnxruntime.

Without VNNI's instructions, the kernel for unsigned activations and signed weights adds products up
in pairs of 16 bits: 255 * 127 twice is more than they hold, is cut off, and the sum is wrong.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

ROWS, INNER, COLUMNS = 2, 4, 16
PRODUCT = (
    b"\x08\x07:\\\n\x18\n\x01a\n\x01b\x12\x01c\"\rMatMulInteger\x12\x01g"
    b"Z\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x02\n\x02\x08\x04"
    b"Z\x13\n\x01b\x12\x0e\n\x0c\x08\x03\x12\x08\n\x02\x08\x04\n\x02\x08\x10"
    b"b\x13\n\x01c\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x02\n\x02\x08\x10"
    b"B\x04\n\x00\x10\r"
)  # fmt: skip
"""A graph of one MatMulInteger, a (uint8, 2 x 4) times b (int8, 4 x 16), as the library onnx writes
it: that library is not among those which a loaded model needs."""


@cache
def saturates(runtime: Any) -> bool:
    """Say whether `runtime`, the module onnxruntime, cuts sums of 8-bit products off here.

    One product is tried, which takes a millisecond: which instructions are used depends on the CPU
    and on the version of onnxruntime.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    largest = {
        "a": np.full((ROWS, INNER), 255, np.uint8),
        "b": np.full((INNER, COLUMNS), 127, np.int8),
    }
    (found,) = session.run(None, largest)
    return bool((found != 255 * 127 * INNER).any())
