"""The concept-balanced filter on millions of synthetic captions: time and memory.

    python tests/benchmarks/filter_cpu.py [--captions 3000000] [--workers 2]

Words are drawn by Zipf's law, so that phrases are as uneven as in the web's captions. Limits: 5
minutes and 2 GB for 3 million on two cores. Memory is the sum of what each process takes.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from llavakit.cli import main

TEMPLATES = (
    "a {a} {n} on a {m}", "the {n} of a {m} near the {o}", "{n} and {m} in the {a} {o}",
    "a man riding a {n} on top of a {m}", "two {a} {n} standing beside a {m} with {o}",
    "close up of a {a} {n} , isolated on {m} background",
)  # fmt: skip
_BLOCK = 100_000


def write_captions(path: Path, count: int) -> None:
    """Write captions of 50,000 nouns and 2,000 adjectives, rare ones mostly."""
    draw = np.random.default_rng(0)
    letters = np.array(list("bcdfgklmnprstvz"))
    vowels = np.array(list("aeiou"))

    def words(many: int) -> list[str]:
        parts = [draw.choice(letters, (many, 4)), draw.choice(vowels, (many, 4))]
        return ["".join(sum(zip(c, v, strict=True), ())) for c, v in zip(*parts, strict=True)]

    nouns, adjectives = words(50_000), words(2_000)
    with path.open("w") as file:
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            picks = np.minimum(draw.zipf(1.15, (size, 3)) - 1, len(nouns) - 1)
            which = np.minimum(draw.zipf(1.3, size) - 1, len(adjectives) - 1)
            forms = draw.integers(len(TEMPLATES), size=size)
            for number in range(size):
                n, m, o = (nouns[pick] for pick in picks[number])
                caption = TEMPLATES[forms[number]].format(
                    a=adjectives[which[number]], n=n, m=m, o=o
                )
                file.write(f'{{"id": "{start + number}", "caption": "{caption}"}}\n')


class Peak(threading.Thread):
    """Watches the memory of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.done = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.done.wait(0.5):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it ended just now
                    continue
            self.bytes = max(self.bytes, total)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=3_000_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_captions(folder / "captions.jsonl", arguments.captions)
        recipe = folder / "filter.toml"
        recipe.write_text(
            f'[[steps]]\nuse = "filter"\ncaptions = "{folder / "captions.jsonl"}"\n'
            f'chunker = "light"\nworkers = {arguments.workers}\n'
        )
        peak = Peak()
        peak.start()
        begun = time.monotonic()
        before = [resource.getrusage(who) for who in _WHO]
        code = main([str(recipe), "--out", str(folder / "run")])
        seconds = time.monotonic() - begun
        after = [resource.getrusage(who) for who in _WHO]
        peak.done.set()
        assert code == 0
        cpu = sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime
                  for a, b in zip(before, after, strict=True))  # fmt: skip
        kept = sum(1 for _ in (folder / "run" / "01-filter" / "kept.jsonl").open())
    share = arguments.captions / 3_000_000
    print(f"{'':24}{'measured':>12}{'limit':>12}")
    print(f"{'captions':24}{arguments.captions:>12,}")
    print(f"{'kept':24}{kept:>12,}")
    print(f"{'seconds':24}{seconds:>12.1f}{300 * share:>12.1f}")
    print(f"{'CPU seconds':24}{cpu:>12.1f}")
    print(f"{'memory in GB':24}{peak.bytes / 1e9:>12.2f}{2.0:>12.2f}")
    print(f"{arguments.workers} workers, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

if __name__ == "__main__":
    run()
