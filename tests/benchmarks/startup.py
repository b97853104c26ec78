"""How long commands take from their start, beside the import that users of transformers wait for.

    python tests/benchmarks/startup.py [--rounds 5]

Each command runs as a process of its own, all in turn, with PyTorch installed: CPU time, wall time
and peak memory, medians; `ratio` is the median of wall times over that of
`from transformers import LlavaForConditionalGeneration, AutoProcessor` in the same round. The
models are tiny, with random weights, so that what is measured is the way to the first answer.
Exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

PEER = "from transformers import LlavaForConditionalGeneration, AutoProcessor"
ABILITIES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


class Cost(NamedTuple):
    """What a process took: seconds of CPU and of wall time, and its peak in MB."""

    cpu: float
    wall: float
    peak: float


class Limit(NamedTuple):
    """What a command may take; None: as much as it likes."""

    cpu: float | None = None
    wall: float | None = None
    ratio: float | None = None
    peak: float | None = None  #: MB, the files of the model not counted


def run(command: list[str]) -> Cost:
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    wall = time.perf_counter() - begun
    return Cost(used.ru_utime + used.ru_stime, wall, used.ru_maxrss / 1024)


def make_files(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.plugins.onnx_models import make_model, make_pictures

    from llavakit import save_model

    save_model(make_model(), folder / "model")
    make_pictures(folder)
    arguments = ["export", str(folder / "model"), str(folder / "onnx"), "--format", "onnx"]
    run([sys.executable, "-m", "llavakit", *arguments])
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red ."}]
    rows = [{"id": f"{number}", "conversations": turns} for number in range(1000)]
    (folder / "rows.json").write_text(json.dumps(rows))
    review = {"question_id": 1, "category": "llava_bench_detail", "text": "8 7\nBoth do."}
    (folder / "reviews.jsonl").write_text(json.dumps(review) + "\n")


def commands(folder: Path) -> dict[str, tuple[list[str], Limit]]:
    ask = ["--image", f"{folder / '0.png'}", "--prompt", "what ?", "--max-new-tokens", "1"]
    half = Limit(wall=0.5)
    found = {
        "chat, PyTorch": (["chat", f"{folder / 'model'}", *ask], Limit(ratio=1.0)),
        "chat, ONNX": (["chat", f"{folder / 'onnx'}", *ask], Limit(wall=1.0, peak=150)),
        "tiny --plan": (["tiny", "--plan"], Limit(cpu=1.5)),
        "llava13b --plan": (["llava13b", "--plan"], Limit(cpu=2.0)),
        "plugins": (["plugins"], half),
        "check-data": (["check-data", f"{folder / 'rows.json'}"], half),
        "score": (["score", "reviews", f"{folder / 'reviews.jsonl'}"], half),
        "recipes": (["recipes"], half),
    }
    return {
        n: ([sys.executable, "-m", "llavakit", *line], limit) for n, (line, limit) in found.items()
    }


def machine() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    able = " ".join(name for name in ABILITIES if name in flags) or "abilities unknown"
    return f"{os.cpu_count()} cores ({able}), Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds: int = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        # in a process of its own: the peak of a child begins at that of its parent
        made = get_context("spawn").Process(target=make_files, args=(folder,))
        made.start()
        made.join()
        size = sum(f.stat().st_size for f in (folder / "onnx").rglob("*") if f.is_file()) / 2**20
        lines = commands(folder)
        costs: dict[str, list[Cost]] = {name: [] for name in (PEER, *lines)}
        for _ in range(rounds + 1):  # the first reads the files from the disk
            costs[PEER].append(run([sys.executable, "-c", PEER]))
            for name, (line, _) in lines.items():
                costs[name].append(run(line))
    print(f"{machine()}; medians of {rounds} rounds")
    print(f"{'':20}{'CPU s':>8}{'wall s':>8}{'ratio':>8}{'MB':>8}  limit")
    missed = 0
    for name, found in costs.items():
        cpu, wall, peak = (statistics.median(column) for column in zip(*found[1:], strict=True))
        ratio = statistics.median(
            own.wall / peer.wall for own, peer in zip(found[1:], costs[PEER][1:], strict=True)
        )
        limit = lines[name][1] if name in lines else Limit()
        seen = (cpu, wall, ratio, peak - (size if name == "chat, ONNX" else 0))
        told = [
            f"{what} {bound:g} {'held' if value <= bound else 'MISSED'}"
            for what, bound, value in zip(Limit._fields, limit, seen, strict=True)
            if bound is not None
        ]
        missed += sum("MISSED" in text for text in told)
        label = name if name in lines else "transformers' import"
        print(f"{label:20}{cpu:8.2f}{wall:8.2f}{ratio:8.2f}{peak:8.0f}  {', '.join(told)}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
