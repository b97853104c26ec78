# ruff: noqa: E402 -- the interpreter and the source roots are settled before the imports
"""Correctness and speed on one CUDA GPU, section by section.

    python tests/benchmarks/gpu.py --call 1 --out results
    python tests/benchmarks/gpu.py --only rates,splice [--seconds 300] [--out FOLDER]

Each section runs in a process of its own with its own time limit: whatever happens to it, the next
one runs. FOLDER gets results.json, rewritten after every row, log.txt, and summary.txt, which is
printed last. Fractions are of ceilings measured in the same call. Exit code 1: something failed, or
is wrong. `--dry-run` walks every line on a CPU at toy sizes, kernels in Triton's interpreter: its
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

DRY = "--dry-run" in sys.argv
os.environ["TRITON_INTERPRET"] = "1" if DRY else "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # no context before the fork
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# one for all processes: torch's own compiler would choose another in some of them
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "llavakit-triton"))
sys.path[:0] = [
    str(Path(__file__).parents[2] / root) for root in ("core", "plugins", "kernels", ".")
]

from tests.benchmarks.gpu_results import Outcome, Results

PRELOADED = (
    "torch", "triton", "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama", "transformers.models.llava.modeling_llava",
    "tests.benchmarks.gpu_training",
)  # fmt: skip
"""What is imported once, before the sections' processes are forked: each import takes seconds."""


@dataclass(frozen=True)
class Section:
    module: str
    function: str
    seconds: float
    """The most that it may take."""
    what: str
    given: tuple[tuple[str, Any], ...] = ()

    def __call__(self, session: Any) -> None:
        run: Callable[..., None] = getattr(
            importlib.import_module(f"tests.benchmarks.{self.module}"), self.function
        )
        run(session, **dict(self.given))


SECTIONS: dict[str, Section] = {
    "environment": Section("gpu_models", "environment", 30, "versions, and what is missing"),
    "rates": Section("gpu_kernels", "rates", 20, "the ceilings"),
    "compilation": Section("gpu_kernels", "compilation", 90, "every kernel, by many processes"),
    "compilation1": Section(
        "gpu_kernels", "compilation", 60, "the kernels that are timed", (("brief", True),)
    ),
    "correctness": Section("gpu_kernels", "correctness", 100, "kernels against float64"),
    "correctness1": Section(
        "gpu_kernels", "correctness", 45, "the kernels that are timed", (("brief", True),)
    ),
    "attention": Section("gpu_attention", "attention", 60, "attention's kernels against float64"),
    "models": Section("gpu_models", "models", 60, "steps and answers against the CPU's"),
    "smoke": Section("gpu_training", "smoke", 50, "2 layers of a 13B against transformers"),
    "splice1": Section("gpu_kernels", "splice", 25, "splice at one shape", (("brief", True),)),
    "mlp1": Section("gpu_kernels", "mlp", 25, "mlp at one shape", (("brief", True),)),
    "stage1": Section("gpu_training", "stage1", 110, "a step of stage 1, 13B"),
    "stage2": Section("gpu_training", "stage2", 80, "a step of stage 2, 7B"),
    "layers16": Section("gpu_training", "layers16", 50, "stage 2 of 16 layers in float32"),
    "splice": Section("gpu_kernels", "splice", 60, "splice at every shape"),
    "mlp": Section("gpu_kernels", "mlp", 60, "mlp at every shape"),
    "loss": Section("gpu_kernels", "loss", 40, "the loss, and liger-kernel's"),
    "tiny": Section("gpu_models", "tiny", 155, "recipes/tiny.toml, stopped and resumed"),
    "decode": Section("gpu_decoding", "decode", 70, "answers of a 7B, beside transformers"),
    "small": Section("gpu_training", "small", 100, "a step of a model of 135M, compiled, too"),
    "profile": Section("gpu_training", "profile", 40, "kernels of a step, by time"),
    "configurations": Section("gpu_kernels", "configurations", 60, "every tile"),
    "compile": Section("gpu_models", "compiled", 60, "a step of either stage with `compile`"),
    "sanitizer": Section("gpu_kernels", "sanitizer", 90, "compute-sanitizer's memcheck"),
    "rates-after": Section("gpu_kernels", "rates", 15, "the ceilings again"),
}
# What goes wrong, for the test of this script.
TROUBLE = {
    name: Section("gpu_trouble", name, 60, "")
    for name in ("hangs", "crashes", "fails", "exhausts", "errs")
}

CALLS: dict[str, tuple[float, str]] = {
    "1": (
        290,
        "environment rates compilation correctness attention models smoke splice1 mlp1 rates-after",
    ),
    "2": (285, "rates compilation1 splice mlp stage1 stage2 small decode models loss rates-after"),
    "3": (
        170,
        "rates decode stage2 small loss splice profile configurations sanitizer rates-after",
    ),
}
"""Three calls that share a quarter of an hour: seconds, and sections in order of their value."""

SPARE = 3.0  # seconds that the end of a call takes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--call", choices=CALLS, help="the sections of one call")
    parser.add_argument("--only", help="sections to run, by commas: " + ", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, help="a folder for results.json, log.txt, summary.txt")
    parser.add_argument("--seconds", type=float, help="time for all sections")
    parser.add_argument("--limit", type=float, help="most seconds of each section")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--list", action="store_true", help="list the sections and end")
    for name in ("section", "ceilings", "compile"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--brief", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--small-case", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        for name, section in SECTIONS.items():
            print(f"{name:15}{section.seconds:5.0f} s at most  {section.what}")
        return 0
    seconds, names = CALLS[options.call] if options.call else (450.0, " ".join(SECTIONS))
    chosen = options.only.split(",") if options.only else names.split()
    unknown = [name for name in chosen if name not in SECTIONS | TROUBLE]
    if unknown:
        print(f"no section is named {unknown[0]!r}: take of {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    if reason := _cannot_run():
        print(reason, file=sys.stderr)
        return 2
    seconds = options.seconds or seconds
    if options.section:
        ceilings = tuple(map(float, options.ceilings.split(",")))
        _run(options.section, seconds, ceilings, options.out)
    if options.compile or options.small_case:
        from tests.benchmarks import gpu_kernels

        if options.small_case:
            gpu_kernels.small_case()
        else:
            gpu_kernels.compile_share(options.compile, options.brief)
        return 0
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    return Call(chosen, seconds, options.limit, options.out).run()


def _cannot_run() -> str | None:
    """Return why nothing can be measured here, or None."""
    import numpy
    import torch
    import triton

    if not DRY and not torch.cuda.is_available():
        return (
            "tests/benchmarks/gpu.py measures on a CUDA GPU and this machine has none: run it "
            "where torch.cuda.is_available(), or with --dry-run to check the script itself"
        )
    new = numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
    if DRY and triton.__version__.startswith("3.6.") and new:
        return (
            "--dry-run needs the interpreter of Triton, and that of 3.6 does not run with "
            f"NumPy {numpy.__version__}: install numpy<2.4"
        )
    return None


class Call:
    """Runs sections one after another, each in a process of its own, and keeps what they find."""

    def __init__(
        self, names: list[str], seconds: float, limit: float | None, out: Path | None
    ) -> None:
        self.names, self.limit, self.out = names, limit, out
        self.deadline = time.monotonic() + seconds
        self.results = Results(out)
        self.ceilings = (8e14, 3e12)  # an H100's, until they are measured
        self.running = 0

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        for name in PRELOADED:
            try:
                importlib.import_module(name)
            except Exception as error:  # then each section that needs it says so
                self.results.say(f"cannot import {name}: {error!r:.200}")
        for name in self.names:
            left = self.deadline - time.monotonic() - SPARE
            section = (SECTIONS | TROUBLE)[name]
            limit = min(section.seconds if self.limit is None else self.limit, left)
            if left < min(5.0, section.seconds):
                self.results.ended(name, 0.0, Outcome.LEFT_OUT, "no time was left")
                continue
            self._section(name, limit)
            self._read_ceilings()
        return self.results.close()

    def _stop(self, number: int, frame: Any) -> NoReturn:
        """Somebody ends the whole call: keep what there is."""
        if self.running:
            with contextlib.suppress(OSError):
                os.killpg(self.running, signal.SIGKILL)
        self.results.say(f"ended from outside by {signal.Signals(number).name}")
        self.results.close()
        os._exit(1)

    def _read_ceilings(self) -> None:
        for row in self.results.rows.get("rates", [])[-1:]:
            self.ceilings = (row["product_TFLOPs"] * 1e12, row["copy_TBs"] * 1e12)

    def _section(self, name: str, limit: float) -> None:
        print(f"\n# {name} (at most {limit:.0f} s)", flush=True)
        begun = time.monotonic()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()  # so that what it starts ends with it
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            _run(name, limit, self.ceilings, self.out)
        os.close(writer)
        self.running = child
        over, code = self._listen(reader, child, begun + limit)
        self.running = 0
        os.close(reader)
        seconds = time.monotonic() - begun
        if over:
            self.results.ended(name, seconds, Outcome.TOO_LONG, f"ended after {limit:.0f} s")
        elif code is None:
            self.results.ended(name, seconds, Outcome.FAILED, "its process cannot be ended")
        elif code < 0:
            died = f"killed by {signal.Signals(-code).name}"
            self.results.ended(name, seconds, Outcome.FAILED, died)
        elif code:
            self.results.ended(name, seconds, Outcome.FAILED, f"exit code {code}")
        else:
            self.results.ended(name, seconds, Outcome.DONE, "")

    def _listen(self, reader: int, child: int, end: float) -> tuple[bool, int | None]:
        """Take the section's lines until it ends; return whether it took too long, and its code."""
        rest, over, code = b"", False, None
        while True:
            if select.select([reader], [], [], 0.2)[0]:
                data = os.read(reader, 1 << 16)
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self.results.line(line.decode(errors="replace"))
                if data:
                    if time.monotonic() < end:
                        continue
                elif code is not None:
                    break
            if code is None:
                code = _code(child)
            if code is not None or time.monotonic() > end:
                over = code is None
                with contextlib.suppress(OSError):  # what it started, too
                    os.killpg(child, signal.SIGKILL)
                gone = time.monotonic() + 5  # a process in the driver may never end
                while code is None and time.monotonic() < gone:
                    time.sleep(0.05)
                    code = _code(child)
                while select.select([reader], [], [], 0.1)[0] and (
                    data := os.read(reader, 1 << 16)
                ):
                    rest += data
                break
        for line in rest.split(b"\n"):
            self.results.line(line.decode(errors="replace"))
        return over, code


def _code(child: int) -> int | None:
    """Return a process's exit code, negative for a signal, or None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _run(name: str, seconds: float, ceilings: tuple[float, ...], out: Path | None) -> NoReturn:
    """Run one section and end the process."""
    import torch

    in_bad_fork = getattr(torch._C, "_cuda_isInBadFork", lambda: False)
    if not DRY and in_bad_fork():  # an import has opened the device: start afresh
        given = [
            "--section",
            name,
            "--seconds",
            str(seconds),
            "--ceilings",
            "{},{}".format(*ceilings),
        ]
        given += [] if out is None else ["--out", str(out)]
        os.execv(sys.executable, [sys.executable, __file__, *given])
    from tests.benchmarks.gpu_session import Session

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(0.5, seconds - 1.5), exit=False)  # where it hangs
    torch.manual_seed(0)
    if DRY:  # the tensors are tiny: threads only wait for each other
        torch.set_num_threads(1)
    code, heard = 0, _hear_compilations()
    try:
        (SECTIONS | TROUBLE)[name](Session(seconds, ceilings[0], ceilings[1], out))
    except BaseException:  # SystemExit, too: the process ends here in any case
        import traceback

        traceback.print_exc()
        code = 1
    if heard:
        longest = sorted(heard, reverse=True)[:8]
        told = ", ".join(f"{kernel} {taken:.1f} s" for taken, kernel in longest)
        total = sum(taken for taken, _ in heard)
        print(f"{name}: {len(heard)} kernels were compiled in {total:.1f} s: {told}")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # no library's clean-up may hang


def _hear_compilations() -> list[tuple[float, str]]:
    """Return a list that fills with seconds and name of each kernel that was in no cache."""
    import triton

    heard: list[tuple[float, str]] = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **more: Any) -> None:
        if not cache_hit:
            taken = sum(each for _, each in times.lowering_stages) / 1e6
            heard.append((taken, str(getattr(src, "name", src))[:60]))

    triton.knobs.compilation.listener = listen
    return heard


if __name__ == "__main__":
    sys.exit(main())
