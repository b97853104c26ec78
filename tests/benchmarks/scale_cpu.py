"""What scales, and how flat it stays, on one machine's CPU; one section a subject.

    python tests/benchmarks/scale_cpu.py [SECTION ...]

Without a name all sections run, one after another. Each prints one small table: what was measured,
the ratio, the limit. A section is a function without arguments, listed in `SECTIONS`.

Memory is what a process has for itself (anonymous pages, by /proc/self/smaps_rollup), less what it
has once everything is imported. `mapped` is what it shows of files, libraries included, which all
processes of a machine have together, and which the system takes back where it needs memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.ranks import pause, ranks

if TYPE_CHECKING:
    from llavakit_plugins.datasets.columns import Columns
    from llavakit_plugins.training import rows
    from llavakit_plugins.training.corpus import Corpus

COUNTS = (10_000, 100_000, 1_000_000, 10_000_000)
STEPS = 1000  # that are read
TOKENISED = 61 << 14  # samples that are tokenised, of more: whole blocks
MOST_MB, MOST_SECONDS, MOST_GROWTH = 300, 10.0, 1.10


def data() -> None:
    """Tokenising, and then the start and the memory of a resumed step, for synthetic samples.

    Samples of 4 to 40 words, every second one about one of 4,096 images; two processes. Of more
    than a million the first million are tokenised, and their blocks stand in for all others.
    """
    counts = [int(text) for text in os.environ.get("SCALE_COUNTS", "").split()] or COUNTS
    print(
        f"{'samples':>10} {'tokenise us':>12} {'MB':>5} {'on disk':>8} | {'start s':>8} {'MB':>5} "
        f"{'mapped':>7} {'us to read':>10}"
    )
    first: dict[str, float] = {}
    for count in counts:
        with TemporaryDirectory(dir=os.environ.get("SCALE_FOLDER")) as name:
            folder = Path(name)
            made = max(_processes("make", folder, count), key=lambda found: found["mb"])
            size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
            started = max(_processes("start", folder, count), key=lambda found: found["mb"])
            print(
                f"{count:10,} {made['us']:12.1f} {made['mb']:5.0f} {size / 1e6:7.0f}M | "
                f"{started['seconds']:8.2f} {started['mb']:5.0f} {started['mapped']:7.0f} "
                f"{started['us']:10.1f}",
                flush=True,
            )
            first = first or {"make": made["us"], "step": started["us"]}
    tokenise, step = made["us"] / first["make"], started["us"] / first["step"]
    memory, start = max(made["mb"], started["mb"]), started["seconds"]
    print(
        f"\nof {counts[-1]:,} against {counts[0]:,}, a sample costs {tokenise:.2f}x to tokenise "
        f"and {step:.2f}x to read\n(limit {MOST_GROWTH}x); memory {memory:.0f} MB "
        f"(limit {MOST_MB}), start {start:.1f} s (limit {MOST_SECONDS:.0f})"
    )


def _processes(what: str, folder: Path, count: int) -> list[dict[str, float]]:
    """Run two processes of this file under torchrun; return what each measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["measure", what, str(folder), str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(found) != 2:
        sys.exit(done.stdout + done.stderr)
    return found


def _measure(what: str, folder: Path, count: int) -> None:
    """Tokenise synthetic samples, or find them tokenised; print what that took as JSON."""
    from tests.benchmarks.synthetic import Synthetic, small_model

    from llavakit import Use
    from llavakit.contracts.run import Run
    from llavakit_plugins.datasets.columns import Columns
    from llavakit_plugins.training import rows
    from llavakit_plugins.training.features import images_recur
    from llavakit_plugins.training.tokenised import FOLDER, corpus_of
    from llavakit_plugins.training.torchrun import join

    model, template = small_model()
    own = rows.Reading.block

    def block(self: rows.Reading, begin: int, end: int, *more: Any) -> Columns:
        if begin < TOKENISED or end - begin < rows.MOST:
            return own(self, begin, end, *more)
        (blocks,) = (folder / FOLDER).glob("*.blocks")
        return Columns.open(blocks / f"{begin % TOKENISED // rows.MOST:06}.safetensors")

    rows.Reading.block = block  # type: ignore[assignment,method-assign]
    step = folder / "01-pretrain"
    step.mkdir(exist_ok=True)
    stamp = step / "begun.json"  # what the key of data without files hangs on
    with join("cpu") as (group, device):
        if group.is_main and not stamp.exists():
            stamp.write_text("{}")
        group.broadcast(None)

        def build(use: Any, /, **context: Any) -> Any:
            if what == "start":
                sys.exit("the data was read again")
            return Synthetic(count)

        nothing: Any = lambda *_, **__: None  # noqa: E731
        resume = what == "start"
        run = Run(
            step, {}, build, 0, resume, lambda: device, nothing, nothing, nothing, nothing, group
        )
        before, _ = _memory()
        most = [before]
        Thread(target=_look, args=(most,), daemon=True).start()
        begun, cpu = time.perf_counter(), time.process_time()
        corpus, _ = corpus_of(run, Use.model_validate({"use": "synthetic"}), model, template, 256)
        spent = time.process_time() - cpu
        found = {"us": 2e6 * spent / min(count, TOKENISED)}
        if what == "start":
            images_recur(corpus, 1, 1 << 20)
            corpus.steps(128)
            batches = corpus.epoch(0, 0, 128, 8192, done=corpus.steps(128) // 2)
            corpus.pack(next(batches).samples[0])
            found["seconds"] = time.perf_counter() - begun
            found["us"] = _read(corpus) / STEPS / 128 * 1e6
        last, mapped = _memory()
        print(json.dumps({**found, "mb": max(*most, last) - before, "mapped": mapped}), flush=True)
        group.broadcast(None)


def _read(corpus: Corpus) -> float:
    """Return the CPU seconds of making the micro-batches of many steps, anywhere in the data."""
    spent, left = 0.0, STEPS
    for epoch in range(1, STEPS + 1):
        batches = corpus.epoch(0, epoch, 128, 8192)
        first = next(batches)  # not the order of all samples, which is made once an epoch
        begun = time.process_time()
        for batch in islice(chain([first], batches), left):
            left -= 1
            for micro in batch.samples:
                corpus.pack(micro)
        spent += time.process_time() - begun
        if not left:
            break
    return spent


def _look(most: list[float]) -> None:
    """Keep the most memory of its own so far, as far as a look now and then finds it."""
    while True:
        most[0] = max(most[0], _memory()[0])
        time.sleep(0.1)


def _memory() -> tuple[float, float]:
    """Return the memory of this process in MB: its own, and what it shows of files."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {row.split()[0].rstrip(":"): int(row.split()[1]) / 1024 for row in rows}
    return sizes["Anonymous"], sizes["Rss"] - sizes["Anonymous"]


SECTIONS: dict[str, Callable[[], None]] = {"data": data, "ranks": ranks, "pause": pause}


def main() -> None:
    if sys.argv[1:2] == ["measure"]:  # one of our own processes
        return _measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    names = sys.argv[1:] or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        sys.exit(f"no section `{unknown[0]}`, but {', '.join(SECTIONS)}")
    for name in names:
        print(f"\n{name}: {SECTIONS[name].__doc__}\n", flush=True)
        SECTIONS[name]()
    return None


if __name__ == "__main__":
    main()
