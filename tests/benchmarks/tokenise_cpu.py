"""How many samples a second are tokenised, on one core and on two.

    python tests/benchmarks/tokenise_cpu.py [ROWS.json IMAGES]

ROWS.json is a file of conversations about the files of a folder, such as `instruct.json` and
`images` of a run of `tiny`; without them, conversations like those are made, about one image. The
tokenizer is LLaMA's where tests find it, else one like it. Rows are read from the file, checked,
rendered by `vicuna_v1`, tokenised and laid out as they are stored; two cores are two processes with
a half each. The table has the best of three rounds: wall time for two cores, CPU time for one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import published

from llavakit import PromptTemplate, Registry, Use, View, Views
from llavakit_plugins.datasets.conversations import Conversations
from llavakit_plugins.huggingface.tokenizers import find_tokenizer
from llavakit_plugins.training.rows import Reading

SAMPLES, ROUNDS = 24_576, 3
LLAVA_15 = 665_298  # samples of LLaVA-1.5's instruction data
LEAST = 30_000  # samples a second, on two cores

_COLOURS = ("red", "green", "blue", "grey", "white", "yellow", "purple", "orange")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PLACES = ("top", "bottom", "middle", "left", "right")


def _write(path: Path) -> None:
    """Write as many rows as tiny has, as long as its own."""
    scenes = list(product(_COLOURS, _DIGITS, _PLACES, _COLOURS))
    rows = []
    for number in range(SAMPLES):
        colour, digit, place, canvas = scenes[number * 7919 % len(scenes)]
        shows = f"The {place} shows a {colour} {digit}."
        said = [
            ("Tell me everything that the image shows.", f"The canvas is {canvas}. {shows}"),
            ("Which digit is there?", shows),
            ("What colour is the canvas?", f"The canvas is {canvas}."),
            ("Where is the digit?", shows),
        ]
        turns: list[dict[str, str]] = []
        for question, answer in said[:1] if number % 3 else said:
            first = "" if turns else "<image>\n"
            turns += [
                {"from": "human", "value": f"{first}{question}"},
                {"from": "gpt", "value": answer},
            ]
        rows.append({"id": f"train-{number:06}", "conversations": turns})
        rows[-1]["image"] = "scene.png"
    path.write_text(json.dumps(rows))
    Image.new("RGB", (72, 72)).save(path.with_name("scene.png"))


def _half(reading: Reading, half: int) -> None:
    middle = len(reading.data) // 2
    reading.block(*((0, middle), (middle, len(reading.data)))[half])


def main() -> None:
    with TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if sys.argv[1:] else Path(folder) / "rows.json"
        if not sys.argv[1:]:
            _write(path)
        _report(path, Path(sys.argv[2]) if sys.argv[2:] else path.parent)


def _report(path: Path, images: Path) -> None:
    chosen, tokenizer = {"path": path, "images": images}, find_tokenizer(str(published.llama()))
    template = Registry.installed().build(
        Use[PromptTemplate].model_validate({"use": "vicuna_v1", "system": ""})
    )
    checks, ones, twos = [], [], []
    for _ in range(ROUNDS):
        begun = time.process_time()
        data = Conversations(Conversations.Options.model_validate(chosen))
        checks.append(time.process_time() - begun)
        reading = Reading(data, template, tokenizer, Views(None, View(336, 9)), 2048)
        begun = time.process_time()
        reading.block(0, len(data))
        ones.append(time.process_time() - begun)
        processes = [get_context("fork").Process(target=_half, args=(reading, n)) for n in (0, 1)]
        begun = time.perf_counter()
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        twos.append(time.perf_counter() - begun)
    count, check, one, two = len(data), min(checks), min(ones), min(twos)
    print(f"{count:,} samples of {path.name}; {os.cpu_count()} cores\n")
    print(f"{'':26} {'us a sample':>12} {'samples/s':>10}")
    for name, spent in (("reading and checking rows", check), ("tokenising, one core", one)):
        print(f"{name:26} {spent / count * 1e6:12.1f} {count / spent:10,.0f}")
    print(f"{'tokenising, two cores':26} {two / count * 1e6:12.1f} {count / two:10,.0f}")
    print(
        f"\n{count / two / LEAST:.2f} of the goal of {LEAST:,} samples a second; {LLAVA_15:,} like "
        f"these take {LLAVA_15 * (check + two) / count:.0f} s on two cores, rows checked"
    )


if __name__ == "__main__":
    main()
