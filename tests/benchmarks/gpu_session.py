"""What the sections of gpu.py share: rows of results, times, ceilings, and devices.

A section runs in a process of its own. Its rows leave that process as lines of its output, so that
whatever ends it, what it had found stays.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.benchmarks.gpu_results import MARK
from torch import Tensor

DRY = "--dry-run" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")

Run = Callable[[], object]


@dataclass
class Session:
    """A section's clock, the ceilings that its fractions are of, and what it found."""

    seconds: float
    flops: float = 8e14  # of an H100, until they are measured
    bytes: float = 3e12
    out: Path | None = None
    """A folder for texts that are too long for rows."""
    device: torch.device = DEVICE
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def time_for(self, what: str, seconds: float) -> bool:
        """Say whether so many seconds are left; if not, note what is left out."""
        if self.left() > seconds:
            return True
        self.row("left out", what=what, needs=seconds, left=round(self.left()))
        return False

    def row(self, section: str, **values: Any) -> None:
        """Keep a row. One with `error` and `limit` is wrong where the first is the larger."""
        self.results.setdefault(section, []).append(values)
        print(f"{MARK}{json.dumps([section, values], default=str)}", flush=True)

    def say(self, text: str) -> None:
        """Keep a line for the summary, which is short: the most important numbers alone."""
        self.row("said", text=text)

    def goal(self, section: str, goal: str, wanted: float, measured: float, **more: Any) -> None:
        """Keep what was aimed at beside what was measured; `more` may lie in the spread."""
        values = {"goal": goal, "wanted": wanted, "measured": measured, **more}
        self.row(f"{section}: goals", **values)

    def text(self, name: str, text: str) -> None:
        """Keep a long text in a file of its own."""
        if self.out is not None:
            with (self.out / name).open("a", encoding="utf-8") as file:
                file.write(text + "\n")


def milliseconds(run: Run, repeat: int = 100) -> float:
    """Median time of a call, the cache of the chip flushed before each."""
    if DRY:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    from triton.testing import do_bench

    return float(do_bench(run, warmup=20, rep=repeat, return_mode="median"))


def replayed_milliseconds(run: Run, repeat: int = 20) -> float:
    """Mean time of a call as part of a CUDA graph, so without the host's work; NaN if it has none.

    A small call takes the host longer than the device, and then `milliseconds` measures the host.
    """
    if DRY:
        return milliseconds(run)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warmed up where capture is allowed
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeat):
            graph.replay()
        end.record()
        end.synchronize()
    except RuntimeError as error:  # it waits for the device, which a graph cannot
        print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        return math.nan
    return float(begin.elapsed_time(end)) / repeat


@dataclass(frozen=True)
class Profile:
    """Where the time of a call goes."""

    seconds: float  #: On the clock, under the profiler.
    busy: float  #: Seconds that the device had work; on a CPU those in operators.
    launches: int
    kernels: list[tuple[str, float, int]]  #: Names, seconds and calls, the longest first.
    table: str


def profiled(run: Run, rows: int = 40) -> Profile:
    """Run once under torch's profiler; `rows` is the length of the table."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not DRY)
    with profile(activities=activities) as found:
        begun = time.perf_counter()
        run()
        if not DRY:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    averages = found.key_averages()
    own = "self_cpu_time_total" if DRY else "self_device_time_total"
    kernels = [(event.key, getattr(event, own) / 1e6, event.count) for event in averages]
    return Profile(
        seconds,
        busy=sum(taken for _, taken, _ in kernels),
        launches=sum(event.count for event in averages if "Launch" in event.key),
        kernels=sorted(kernels, key=lambda kernel: -kernel[1]),
        table=averages.table(
            sort_by="self_cpu_time_total" if DRY else "self_cuda_time_total", row_limit=rows
        ),
    )


def peak_gigabytes(run: Run) -> float:
    """Memory that a call allocates above what was there before it."""
    if DRY:
        run()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm-wise; infinite where anything is not a number."""
    expected = expected.double()
    error = float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if error == error else math.inf


def release() -> None:
    """Give back memory that nothing holds any more."""
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()


def device_memory() -> float:
    """Bytes of the device, asked without opening it: then a process that is forked cannot."""
    found = "" if DRY else _asked("memory.total", units=False)
    return float(found) * 2**20 if found else 0.0


_CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def clocks() -> dict[str, str]:
    """The device's clocks, power and temperature, as nvidia-smi says them."""
    said = _asked(",".join(_CLOCKS)) or ",".join("?" * len(_CLOCKS))
    return dict(zip(_CLOCKS, (value.strip() for value in said.split(",")), strict=False))


def _asked(what: str, units: bool = True) -> str:
    """Return nvidia-smi's answer about the first device, or nothing."""
    form = "csv,noheader" + ("" if units else ",nounits")
    command = ["nvidia-smi", f"--query-gpu={what}", f"--format={form}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(said.stdout.splitlines()), "")
