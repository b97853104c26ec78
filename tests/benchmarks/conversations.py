"""Files of conversations for benchmarks and tests: as short as tiny's, and as long as LLaVA's."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tests import published

_COLOURS = ("red", "green", "blue", "grey", "white", "yellow", "purple", "orange")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PLACES = ("top", "bottom", "middle", "left", "right")

Said = Sequence[tuple[str, str]]
"""Questions and answers."""


def short(count: int) -> Iterator[Said]:
    """Yield conversations as long as those of the recipe `tiny`: 64 tokens with an image."""
    scenes = list(product(_COLOURS, _DIGITS, _PLACES, _COLOURS))
    for number in range(count):
        colour, digit, place, canvas = scenes[number * 7919 % len(scenes)]
        shows = f"The {place} shows a {colour} {digit}."
        said = [
            ("Tell me everything that the image shows.", f"The canvas is {canvas}. {shows}"),
            ("Which digit is there?", shows),
            ("What colour is the canvas?", f"The canvas is {canvas}."),
            ("Where is the digit?", shows),
        ]
        yield said[:1] if number % 3 else said


def long(count: int) -> Iterator[Said]:
    """Yield conversations as long as those of LLaVA-Instruct: four turns, 326 tokens.

    Sentences are published questions, answers and captions, where those files are; else our own.
    """
    folder = published.folder()

    def texts(name: str, key: str) -> list[str]:
        return [json.loads(line)[key] for line in (folder / name).read_text().splitlines()]

    questions = texts("llava_bench_coco/questions.jsonl", "text")
    captions = texts("captions/scienceqa_captions.jsonl", "caption")
    sentences = [
        sentence
        for text in texts("llava_bench_coco/gpt4_answers.jsonl", "text")
        for sentence in re.split(r"(?<=\.) ", text)
    ]
    drawn = random.Random(0)
    for _ in range(count):
        said = []
        for _ in range(4):
            question = drawn.choice(questions)
            if drawn.random() < 0.5:
                question = f"{question} {drawn.choice(captions)}"
            chosen = [
                drawn.choice(sentences if drawn.random() < 0.6 else captions) for _ in range(2)
            ]
            said.append((question, " ".join(chosen)))
        yield said


def write(path: Path, conversations: Iterator[Said]) -> None:
    """Write conversations about the image `scene.png`."""
    rows: list[dict[str, Any]] = []
    for number, said in enumerate(conversations):
        turns: list[dict[str, str]] = []
        for question, answer in said:
            first = "" if turns else "<image>\n"
            turns += [
                {"from": "human", "value": f"{first}{question}"},
                {"from": "gpt", "value": answer},
            ]
        row = {"id": f"train-{number:06}", "conversations": turns, "image": "scene.png"}
        rows.append(row)
    path.write_text(json.dumps(rows))
