"""Reading and writing on a CPU: our ONNX folder against transformers' own LLaVA.

    python tests/benchmarks/onnx_cpu.py [--rounds 5] [--threads 2] [--layers 12] [--cpu-time]
                                        [--keep FOLDER] [--precisions fp32 q8]

CLIP B/16 and a Llama of 12 layers x 768, random weights, the same in both. A prompt with one image,
64 new tokens. Prefill is the time to the first token, images included; decode is the rest. Each
run of ours stands next to one of transformers'; ratios are medians over these pairs. Memory is
what a process holds after an answer, less what it held before the model, against the bytes of its
files. `--keep` leaves the export, and finds it again.

On a machine with other work on it wall time says little: `--threads 1 --cpu-time` counts the
processor's time instead. Fewer `--layers` (with as much less vocabulary) are quicker to export.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

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
PAUSE = 0.2
"""Seconds in front of a run: onnxruntime's threads spin on for 50 ms behind one."""
PRECISIONS = ("fp32", "int8", "q8", "q4")
Clock = Callable[[], float]
DECODE = {"fp32": 2.2, "int8": 4.5, "q8": 4.5, "q4": 5.5}
PREFILL = {"fp32": 1.0, "int8": 1.4, "q8": 1.4}


def export(folder: Path, layers: int = 12) -> Any:
    """Return transformers' model and ours; write ours to `folder` unless it is there."""
    from tests.core.peer import make_pair

    shorter = {"num_hidden_layers": layers}
    vocabulary = LANGUAGE["vocab_size"] * layers // 12
    theirs, ours = make_pair(VISION | shorter, LANGUAGE | shorter | {"vocab_size": vocabulary})
    if not folder.exists():
        from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions

        least = dict.fromkeys(("fp16", "int8", "q8", "q4"), 0.0)
        options = OnnxOptions.model_validate(
            {
                "precisions": PRECISIONS,
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
    time.sleep(PAUSE)
    begin = clock()
    out = theirs.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return clock() - begin, out[0, inputs["input_ids"].shape[1] :].tolist()


def time_ours(clock: Clock, model: Any, picture: Any, new: int) -> tuple[float, list[int]]:
    """Return the seconds that onnxruntime takes, and the tokens."""
    time.sleep(PAUSE)
    begin = clock()
    ids = model.generate_ids(PROMPT, [picture], max_new_tokens=new, raw=True)
    return clock() - begin, ids


class Run(NamedTuple):
    prefill: float
    """Seconds to the first token."""
    decode: float
    """Tokens a second behind it."""


class Pair(NamedTuple):
    """Two runs, one right behind the other."""

    theirs: Run
    ours: Run

    @property
    def prefill(self) -> float:
        return self.theirs.prefill / self.ours.prefill

    @property
    def decode(self) -> float:
        return self.ours.decode / self.theirs.decode


_MEMORY = """\
import sys
import numpy, onnxruntime
from PIL import Image
from llavakit_plugins.onnx.runtime import load
def held():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    return int(lines["VmRSS"].split()[0]) * 1024
before = held()
folder, precision, prompt, new, threads = sys.argv[1:]
model = load(folder, precision=precision, threads=int(threads))
model.generate_ids(prompt, [Image.new("RGB", (224, 224))], max_new_tokens=int(new), raw=True)
print(held() - before)
"""


def memory(folder: Path, precision: str, threads: int) -> tuple[float, float]:
    """Return the bytes that a process holds for a precision, and those of its files."""
    from llavakit_plugins.onnx.runtime.layout import GRAPHS, graph_file

    settings = [str(folder), precision, PROMPT, str(NEW), str(threads)]
    command = [sys.executable, "-c", _MEMORY, *settings]
    held = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    names = [graph_file(graph, precision) for graph in GRAPHS]
    files = [folder / f"{name}{end}" for name in names for end in ("", "_data")]
    return held, sum(file.stat().st_size for file in files if file.exists())


def print_row(widths: tuple[int, ...], *cells: str) -> None:
    print("".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    arguments = parser.parse_args()
    import numpy as np
    import torch
    from PIL import Image
    from tests.core.peer import their_inputs

    from llavakit_plugins.onnx.runtime import load

    clock: Clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    place = tempfile.TemporaryDirectory()
    folder = arguments.keep or Path(place.name) / "exported"
    theirs, ours = export(folder, arguments.layers)
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    inputs = their_inputs(ours, PROMPT, ours.prepare([picture]))
    models = {
        name: load(folder, precision=name, threads=arguments.threads)
        for name in arguments.precisions
    }
    for model in models.values():  # random weights end an answer at any time
        model.manifest = model.manifest.model_copy(update={"end_tokens": ()})

    pairs: dict[str, list[Pair]] = {name: [] for name in models}
    same: dict[str, int] = {}
    for number in range(-1, arguments.rounds):  # the first is to warm up
        for name, model in models.items():
            theirs_1, _ = time_theirs(clock, theirs, inputs, 1)
            ours_1, _ = time_ours(clock, model, picture, 1)
            theirs_all, expected = time_theirs(clock, theirs, inputs, NEW + 1)
            ours_all, got = time_ours(clock, model, picture, NEW + 1)
            same[name] = sum(a == b for a, b in zip(expected, got, strict=True))
            pair = Pair(
                Run(theirs_1, NEW / (theirs_all - theirs_1)), Run(ours_1, NEW / (ours_all - ours_1))
            )
            print(
                f"round {number + 1} {name}: prefill {pair.prefill:.2f}x, decode "
                f"{pair.decode:.2f}x",
                file=sys.stderr,
            )
            if number >= 0:
                pairs[name].append(pair)

    widths = (14, 10, 8, 7, 10, 8, 7, 8, 11, 10, 7)
    print_row(widths, "", "prefill s", "ratio", "limit", "decode/s", "ratio", "limit", "same",
              "memory MB", "files MB", "ratio")  # fmt: skip
    peer = [pair.theirs for found in pairs.values() for pair in found]
    prefill, decode = (median(each) for each in zip(*peer, strict=True))
    print_row(widths, "transformers", f"{prefill:.3f}", "", "", f"{decode:.1f}")
    for name, found in pairs.items():
        prefill, decode = (median(each) for each in zip(*(p.ours for p in found), strict=True))
        held, files = memory(folder, name, arguments.threads)
        limits = [f"{table[name]:.1f}x" if name in table else "" for table in (PREFILL, DECODE)]
        print_row(
            widths, name,
            f"{prefill:.3f}", f"{median(pair.prefill for pair in found):.2f}x", limits[0],
            f"{decode:.1f}", f"{median(pair.decode for pair in found):.2f}x", limits[1],
            f"{same[name]}/{NEW + 1}", f"{held / 1e6:.0f}", f"{files / 1e6:.0f}",
            f"{held / files:.2f}",
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
