"""The ledger of a large job: opening it, finding a reply, and taking over lines of JSON.

    python tests/benchmarks/ledger_open.py [--replies 10000000] [--folder DIR]

Synthetic replies of 120 characters; 10 million take 3.5 GB as a database, and as much again as the
lines of JSON that `--lines` has taken over. Opening is measured in a fresh process, imports and
all; memory is the most that the process had.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import md5
from pathlib import Path

REPLY = (
    "The picture shows thing {n}. Nothing else is certain about it, and so the answer ends here."
)

OPEN = """
import random, resource, sys, time
begun = time.monotonic()
from llavakit_plugins.generation.requests.entries import key_of
from llavakit_plugins.generation.requests.ledger import Ledger
from pathlib import Path
imported = time.monotonic()
with Ledger(Path(sys.argv[1])) as ledger:
    opened = time.monotonic()
    count = len(ledger)
    first = next(iter(ledger))
    for _ in range(10_000):
        number = random.randrange(count)
        assert ledger.get(key_of("0" * 32, f"{number:032x}", 0)).draw == 0
    found = time.monotonic()
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(count, imported - begun, opened - imported, (found - opened) / 10_000 * 1e6, memory)
"""


def entries(count: int) -> Iterator[object]:
    from llavakit import Reply
    from llavakit_plugins.generation.requests.entries import RequestRecord, key_of

    reply = Reply("", "stop", "gpt-4o-2024-08-06", 1500, 20, 0.004)
    model = "0" * 32
    for number in range(count):
        prompt = f"{number:032x}"
        record = RequestRecord(key_of(model, prompt, 0), model, prompt, 0, f"{number:09}-detail")
        from dataclasses import replace

        yield record.entry(replace(reply, text=REPLY.format(n=md5(prompt.encode()).hexdigest())))


def fill(path: Path, count: int) -> None:
    """Write a ledger as `create` does, from entries that come one by one."""
    from llavakit_plugins.generation.requests import database as db

    class Made:
        mark = "made"

        def blocks(self) -> Iterator[list[object]]:
            block: list[object] = []
            for entry in entries(count):
                block.append(entry)
                if len(block) == 1000:
                    yield block
                    block = []
            yield block

    db.create(path, [Made()], None)  # type: ignore[list-item]


def measure(path: Path) -> list[float]:
    found = subprocess.run(
        [sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True
    )
    return [float(word) for word in found.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--lines", action="store_true", help="take over lines of JSON, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        path = Path(name) / "ledger.sqlite"
        begun = time.process_time()
        fill(path, arguments.replies)
        made = time.process_time() - begun
        print(f"{path.stat().st_size / 1e9:.2f} GB, made in {made:.0f} s of CPU time")
        print(f"{'':34}{'measured':>10}{'limit':>8}")
        for _ in range(3):
            count, imports, opening, finding, memory = measure(path)
            print(f"{'replies':34}{count:>10,.0f}")
            print(f"{'imports, s':34}{imports:>10.2f}")
            print(f"{'opening, s':34}{opening:>10.3f}{2:>8}")
            print(f"{'finding one of them, microseconds':34}{finding:>10.0f}")
            print(f"{'memory of the process, MB':34}{memory:>10.0f}{200:>8}")
        path.unlink()
        if arguments.lines:
            old = path.with_suffix(".jsonl")
            with old.open("w") as file:
                for entry in entries(arguments.replies):
                    file.write(json.dumps(asdict(entry)) + "\n")  # type: ignore[call-overload]
            count, _, opening, _, memory = measure(path)
            print(f"{count:,.0f} lines taken over: {opening:.0f} s, {memory:.0f} MB")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
