"""Reading and writing on a CPU: our ONNX folder against transformers' own LLaVA.

    python tests/benchmarks/onnx_cpu.py [--rounds 4] [--threads 2] [--layers 12] [--cpu-time]
                                        [--keep FOLDER]

CLIP B/16 and a Llama of 12 layers x 768, random weights, the same in both. A prompt with one image,
64 new tokens; alternating runs, the best of each. Prefill is the time to the first token, images
included; decode is the rest. Memory is what a process holds after an answer, less what it held
before the model, against the bytes of its files. `--keep` leaves the export, and finds it again.

On a machine with other work on it wall time says little: `--threads 1 --cpu-time` counts the
processor's time instead. Fewer `--layers` (with as much less vocabulary) are quicker to export.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 16, "projection_dim": 512,
}  # fmt: skip
LANGUAGE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 32000, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
PROMPT = "<image>\nwhat colour is the circle in the picture ? what shape is the square ?"
NEW = 64
Clock = Callable[[], float]
DECODE = {"fp32": 2.2, "q8": 4.5, "q4": 5.5}
PREFILL = {"fp32": 1.0, "q8": 1.4, "q4": 1.4}


def export(folder: Path, layers: int = 12) -> Any:
    """Return transformers' model and ours; write ours to `folder` unless it is there."""
    from tests.core.peer import make_pair

    shorter = {"num_hidden_layers": layers}
    vocabulary = LANGUAGE["vocab_size"] * layers // 12
    theirs, ours = make_pair(VISION | shorter, LANGUAGE | shorter | {"vocab_size": vocabulary})
    if not folder.exists():
        from llavakit_plugins.exporters.onnx.exporter import Onnx, OnnxOptions

        least = dict.fromkeys(("fp16", "int8", "q8", "q4"), 0.0)
        options = OnnxOptions.model_validate(
            {
                "precisions": ["fp32", "int8", "q8", "q4"],
                "tolerance": 1e-3,
                "least_agreement": least,
            }
        )
        figures = Onnx(options).export(ours, folder)
        for name, value in figures.items():
            print(f"{name}: {value:.4g}")
    return theirs, ours


def time_theirs(
    clock: Clock, theirs: Any, inputs: dict[str, Any], new: int
) -> tuple[float, list[int]]:
    """Return the seconds that transformers takes, and the tokens."""
    begin = clock()
    out = theirs.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return clock() - begin, out[0, inputs["input_ids"].shape[1] :].tolist()


def time_ours(clock: Clock, model: Any, picture: Any, new: int) -> tuple[float, list[int]]:
    """Return the seconds that onnxruntime takes, and the tokens."""
    begin = clock()
    ids = model.generate_ids(PROMPT, [picture], max_new_tokens=new, raw=True)
    return clock() - begin, ids


_MEMORY = """\
import sys
import numpy, onnxruntime
from PIL import Image
from llavakit_plugins.onnx_runtime import load
def held():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    return int(lines["VmRSS"].split()[0]) * 1024
before = held()
folder, precision, prompt, new = sys.argv[1:]
model = load(folder, precision=precision, threads=2)
model.generate_ids(prompt, [Image.new("RGB", (224, 224))], max_new_tokens=int(new), raw=True)
print(held() - before)
"""


def memory(folder: Path, precision: str) -> tuple[float, float]:
    """Return the bytes that a process holds for a precision, and those of its files."""
    from llavakit_plugins.onnx_runtime.layout import GRAPHS, graph_file

    command = [sys.executable, "-c", _MEMORY, str(folder), precision, PROMPT, str(NEW)]
    held = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    names = [graph_file(graph, precision) for graph in GRAPHS]
    files = [folder / f"{name}{end}" for name in names for end in ("", "_data")]
    return held, sum(file.stat().st_size for file in files if file.exists())


def print_row(widths: tuple[int, ...], *cells: str) -> None:
    print("".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    import torch
    from PIL import Image
    from tests.core.peer import their_inputs

    from llavakit_plugins.onnx_runtime import load

    clock: Clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    place = tempfile.TemporaryDirectory()
    folder = arguments.keep or Path(place.name) / "exported"
    theirs, ours = export(folder, arguments.layers)
    picture = Image.effect_noise((224, 224), 60).convert("RGB")
    inputs = their_inputs(ours, PROMPT, ours.prepare([picture]))
    precisions = json.loads((folder / "export.json").read_text())["precisions"]
    models = {name: load(folder, precision=name, threads=arguments.threads) for name in precisions}
    for model in models.values():  # random weights end an answer at any time
        model.manifest = model.manifest.model_copy(update={"end_tokens": ()})

    best: dict[tuple[str, int], float] = {}
    tokens: dict[str, list[int]] = {}

    def note(name: str, new: int, seconds: float, ids: list[int]) -> None:
        best[name, new] = min(best.get((name, new), float("inf")), seconds)
        tokens[name] = ids

    for _ in range(arguments.rounds):
        for new in (1, NEW + 1):
            note("transformers", new, *time_theirs(clock, theirs, inputs, new))
            for name, model in models.items():
                note(name, new, *time_ours(clock, model, picture, new))

    def rates(name: str) -> tuple[float, float]:
        first, whole = best[name, 1], best[name, NEW + 1]
        return first, NEW / (whole - first)

    prefill, decode = rates("transformers")
    widths = (14, 10, 8, 7, 10, 8, 7, 8, 11, 10, 7)
    print_row(widths, "", "prefill s", "ratio", "limit", "decode/s", "ratio", "limit", "same",
              "memory MB", "files MB", "ratio")  # fmt: skip
    print_row(widths, "transformers", f"{prefill:.3f}", "", "", f"{decode:.1f}")
    for name in models:
        first, rate = rates(name)
        same = sum(a == b for a, b in zip(tokens[name], tokens["transformers"], strict=False))
        held, files = memory(folder, name)
        limits = [f"{table[name]:.1f}x" if name in table else "" for table in (PREFILL, DECODE)]
        print_row(
            widths, name, f"{first:.3f}", f"{prefill / first:.2f}x", limits[0], f"{rate:.1f}",
            f"{rate / decode:.2f}x", limits[1], f"{same}/{NEW + 1}", f"{held / 1e6:.0f}",
            f"{files / 1e6:.0f}", f"{held / files:.2f}",
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
