"""What each precision can reach on this CPU: its products alone, against fp32's.

    python tests/benchmarks/onnx_products.py [--rows 212] [--rounds 9] [--threads 2] [--cpu-time]

The products of one decoder layer and one layer of the vision encoder of `onnx_cpu.py`, each a graph
of one node with random weights in onnxruntime. Every round runs all precisions one after another;
times are those of all products together, ratios medians over the rounds, errors root mean squares
beside a product of mean square 1. `--threads 1 --cpu-time` on a machine with other work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as runtime

from llavakit_plugins.onnx.exporter.precision import convert
from llavakit_plugins.onnx.runtime.layout import DECODER, Precision
from llavakit_plugins.onnx.runtime.saturation import saturates

SHAPES = ((768, 2304), (768, 768), (768, 4096), (2048, 768), (768, 3072), (3072, 768))
"""Packed queries, keys and values; output; gate and up; down; and the encoder's two of its MLP."""
Table = npt.NDArray[np.float32]
KINDS: dict[str, tuple[str, Precision]] = {
    "fp32": (DECODER, "fp32"),
    "int8": (DECODER, "int8"),
    "q8": (DECODER, "q8"),
    "q4": (DECODER, "q4"),
}


def product(weights_KN: Table) -> onnx.ModelProto:
    """Return a graph of one product."""
    rows, columns = weights_KN.shape
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "weights"], ["y"], name="product")],
        "product",
        [onnx.helper.make_tensor_value_info("x", kind, ["rows", rows])],
        [onnx.helper.make_tensor_value_info("y", kind, ["rows", columns])],
        [onnx.numpy_helper.from_array(weights_KN, "weights")],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto, threads: int) -> Callable[[Table], Table]:
    """Return what computes a product, as our runtime does."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if saturates(runtime):
        options.add_session_config_entry("session.x64quantprecision", "1")
    content = model.SerializeToString()
    opened = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda x: cast("Table", opened.run(None, {"x": x})[0])


def measure(rows: int, rounds: int, threads: int, clock: Callable[[], float]) -> None:
    draw = np.random.default_rng(0)
    weights = [draw.normal(size=shape).astype(np.float32) / shape[0] ** 0.5 for shape in SHAPES]
    inputs = [draw.normal(size=(rows, shape[0])).astype(np.float32) for shape in SHAPES]
    exact = [x @ table for x, table in zip(inputs, weights, strict=True)]
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    errors: dict[str, float] = {}
    ready = {
        name: [session(convert(graph, product(w), precision, None), threads) for w in weights]
        for name, (graph, precision) in KINDS.items()
    }
    for number in range(rounds + 1):  # the first is to warm up
        for name, products in ready.items():
            begin = clock()
            found = [run(x) for run, x in zip(products, inputs, strict=True)]
            if number:
                times[name].append(clock() - begin)
            differences = [((a - b) ** 2).mean() for a, b in zip(found, exact, strict=True)]
            errors[name] = float(np.mean(differences)) ** 0.5
    done = rows * sum(a * b for a, b in SHAPES)
    print(f"{rows} rows".rjust(20), "ms".rjust(8), "GMAC/s".rjust(8), "to fp32".rjust(8), "error")
    for name, taken in times.items():
        ratio = median(a / b for a, b in zip(times["fp32"], taken, strict=True))
        print(
            f"{name:>20} {median(taken) * 1e3:8.2f} {done / median(taken) / 1e9:8.1f} "
            f"{ratio:7.2f}x {errors[name]:.4f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=212, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    measure(arguments.rows, arguments.rounds, arguments.threads, clock)
    measure(1, 5 * arguments.rounds, arguments.threads, clock)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
