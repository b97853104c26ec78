"""How many samples a second a run tokenises, in one process and in two.

    python tests/benchmarks/tokenise_cpu.py [ROWS.json IMAGES]

ROWS.json is a file of conversations about the files of a folder, such as `instruct.json` and
`images` of a run of `tiny`; without them, conversations like those are made, about one image, and
then some as long as LLaVA-Instruct's. The tokenizer is LLaMA's where tests find it, else one like
it. A step of a run finds the file, reads and checks its rows, renders them by `vicuna_v1`,
tokenises them, and writes what training maps. The table has the best of five rounds, in which one
process and two take turns: wall time, and the CPU time of all processes together.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import published
from tests.benchmarks import conversations
from tests.runs import run_in

from llavakit import Dataset, PromptTemplate, Registry, Use, View, Views
from llavakit_plugins.huggingface.tokenizers import find_tokenizer
from llavakit_plugins.training.tokenised import FOLDER, corpus_of

SAMPLES, LONG, ROUNDS = 24_576, 12_288, 5
LLAVA_15 = 665_298  # samples of LLaVA-1.5's instruction data
LEAST, MOST = 30_000, 40.0  # samples a second in two processes; seconds for LLaVA-1.5's


class Seconds(NamedTuple):
    wall: float
    cpu: float  #: Of this process, and of those that it began and that ended.

    def less(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


class Measured:
    """What a step's data took: its rows, and its tokens."""

    def __init__(self, path: Path, images: Path, folder: Path, workers: int) -> None:
        build = Registry.installed().build
        self.rows = Seconds(0.0, 0.0)

        def timed(use: Use[Any], /, **context: Any) -> Any:
            begun = _now()
            found = build(use, **context)
            self.rows = _now().less(begun)
            return found

        model: Any = SimpleNamespace(
            views=Views(None, View(336, 9)),
            visual_tokens=9,
            language=SimpleNamespace(
                tokenizer=find_tokenizer(str(published.llama())), max_length=4096
            ),
        )
        template = build(Use[PromptTemplate].model_validate({"use": "vicuna_v1", "system": ""}))
        chosen = {"use": "conversations", "path": str(path), "images": str(images)}
        use = Use[Dataset].model_validate(chosen)
        run = run_in(folder / "01-pretrain", timed)
        begun = _now()
        corpus, _ = corpus_of(run, use, model, template, 2048, workers=workers)
        self.tokens = _now().less(begun).less(self.rows)
        self.samples, self.length = len(corpus), corpus.tokens / len(corpus)
        (made,) = (folder / FOLDER).iterdir()
        with made.open("rb") as file:
            self.made = hashlib.file_digest(file, "sha256").digest()


def _now() -> Seconds:
    used = os.times()
    return Seconds(time.perf_counter(), sum(used[:4]))


def main() -> None:
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    with TemporaryDirectory() as name:
        folder = Path(name)
        if sys.argv[1:]:
            return _report(Path(sys.argv[1]), Path(sys.argv[2]), folder)
        Image.new("RGB", (72, 72)).save(folder / "scene.png")
        for file, said in (
            ("short.json", conversations.short(SAMPLES)),
            ("long.json", conversations.long(LONG)),
        ):
            conversations.write(folder / file, said)
            _report(folder / file, folder, folder / f"{file}-runs")
    return None


def _report(path: Path, images: Path, folder: Path) -> None:
    names = count()
    pairs = [
        [Measured(path, images, folder / str(next(names)), workers) for workers in (0, 2)]
        for _ in range(ROUNDS)
    ]
    first = pairs[0][0]
    if any(one.made != first.made for pair in pairs for one in pair):
        sys.exit("two processes wrote other bytes than one")
    samples = first.samples
    print(f"\n{samples:,} samples of {path.name}, {first.length:.0f} tokens long on average\n")
    print(f"{'us a sample':32} {'CPU time':>9} {'wall time':>10} {'samples/s':>10}")

    def row(name: str, found: Sequence[Seconds]) -> float:
        wall, cpu = (min(times) / samples for times in zip(*found, strict=True))
        print(f"{name:32} {cpu * 1e6:9.1f} {wall * 1e6:10.1f} {1 / wall:10,.0f}")
        return float(wall)

    rows = row("reading and checking rows", [one.rows for pair in pairs for one in pair])
    row("tokenising, one process", [one.tokens for one, _ in pairs])
    two = row("tokenising, two processes", [two.tokens for _, two in pairs])
    gain = sorted(one.tokens.wall / two.tokens.wall for one, two in pairs)[ROUNDS // 2]
    print(
        f"\ntwo processes are {gain:.2f}x as fast as one (median of pairs), at "
        f"{1 / two / LEAST:.2f} of the goal of {LEAST:,} samples a second;\n{LLAVA_15:,} samples "
        f"like these take {LLAVA_15 * (rows + two):.0f} s, rows checked (goal for tiny's: "
        f"{MOST:.0f} s)"
    )


if __name__ == "__main__":
    main()
