"""Data of our own in the formats of published files, for checkouts that have none of those beside.

The same names, counts and quirks: answers that state no letter, reviews without scores, images that
nobody boxed. Every sentence is made here, from a few words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

THINGS = (
    "dog", "bus", "cat", "boat", "horse", "bench", "kite", "clock", "bird", "truck", "cake", "cup",
    "chair", "train", "bear", "pizza",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "old", "small")
PLACES = ("street", "table", "beach", "field", "river", "wall", "park", "roof", "hill", "station")
IMAGES = 60
QUESTIONS = 90
PROBLEMS = 180
CAPTIONS = 10332
SILENT = range(3, PROBLEMS, 11)
"""Problems, by their place, to which GPT-3 gave no answer: 17."""


def write(name: str, folder: Path) -> None:
    """Write one kind into an empty folder."""
    _KINDS[name](folder)


def _lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _picture(number: int) -> tuple[str, str, str]:
    """Return the thing in a picture, its colour and its place."""
    return (
        THINGS[number % len(THINGS)], COLOURS[number * 7 % len(COLOURS)],
        PLACES[number * 3 % len(PLACES)],
    )  # fmt: skip


def _identity(number: int) -> str:
    return f"{100_000 + 7919 * number:012d}"


def _coco(folder: Path) -> None:
    rows = []
    for number in range(IMAGES):
        thing, colour, place = _picture(number)
        captions = [
            f"A {colour} {thing} on a {place}.",
            f"There is a {thing} near the {place}",
            f"A {place} with a {colour} {thing} in front of it. ",
            f"The {thing} is {colour}.",
            f"Somebody took a picture of a {thing} by a {place}.",
        ]
        step = number % 7 / 20
        boxes = [
            {"category": thing, "bbox": [round(0.1 + step, 3), 0.2, round(0.5 + step, 3), 0.75]},
            {"category": "person", "bbox": [0.612, 0.04, 0.9, 1.0]},
        ]
        name = _identity(number)
        instances = [] if number in (20, 41) else boxes[: 1 + number % 2]
        rows.append(
            {"id": name, "image": f"{name}.jpg", "captions": captions, "instances": instances}
        )
    _lines(folder / "caps_boxes.jsonl", rows)


def _bench(folder: Path) -> None:
    questions: list[dict[str, Any]] = []
    answers = []
    for number in range(QUESTIONS):
        thing, colour, place = _picture(number // 3)
        kind = ("conv", "detail", "complex")[number % 3]
        asked, said = {
            "conv": (
                f"What is the colour of the {thing} in the image?",
                f"The colors of the two suitcases beside the {thing} are {colour}."
                if number == 0
                else f"The {thing} in the image is {colour}.",
            ),
            "detail": (
                "Describe the image in detail.",
                f"The image shows a {colour} {thing} on a {place}. The {thing} stands in the "
                f"middle of the scene, and the {place} takes up most of what is behind it. "
                "Several people can be seen further away, and the light of an early evening "
                "falls on everything from the left.",
            ),
            "complex": (
                f"Why might the {thing} be on the {place}?",
                f"The {thing} may be on the {place} because somebody left it there for a while. "
                f"The people nearby seem to wait for something, so that the {colour} {thing} "
                "could well be theirs.",
            ),
        }[kind]
        image = f"{_identity(number // 3)}.jpg"
        questions.append(
            {"question_id": number, "image": image, "text": asked, "category": kind}
        )  # fmt: skip
        answers.append({"question_id": number, "text": said, "category": kind})
    _lines(folder / "questions.jsonl", questions)
    _lines(folder / "gpt4_answers.jsonl", answers)


def _science(folder: Path) -> None:
    subjects = ("natural science", "social science", "language science")
    problems, outputs, predicted = {}, {}, {}
    for number in range(PROBLEMS):
        thing, colour, place = _picture(number)
        answer, count = number % 2, 2 + number % 4
        name = str(4 + 3 * number)
        problems[name] = {
            "question": f"Which word goes with the {thing}?\nIt is on the {place}.",
            "choices": [f"{colour} {n}" if n else place for n in range(count)],
            "answer": answer,
            "hint": f"Look at the {thing}." if number % 3 == 0 else "",
            "image": "image.png" if number % 45 < 22 else None,  # 88 of 180
            "task": "closed choice", "grade": f"grade{1 + number % 12}",
            "subject": subjects[number % 3], "topic": "things", "category": "Things",
            "skill": f"Name the {thing}",
            "lecture": f"Every {thing}  has a colour." if number % 4 else "",
            "solution": f"The {thing} is {colour}." if number % 5 else "", "split": "test",
        }  # fmt: skip
        said = (answer + (number % 5 == 1)) % count
        outputs[name] = "" if number in SILENT else (
            f"The answer is {'ABCDE'[said]}. BECAUSE: The {thing} is {colour}."
        )  # fmt: skip
        predicted[name] = said
    (folder / "problems.json").write_text(json.dumps(problems, indent=1))
    right = sum(predicted[name] == row["answer"] for name, row in problems.items())
    gpt3 = {
        "model": "own", "outputs": outputs, "predicted": predicted, "accuracy": right / PROBLEMS,
    }  # fmt: skip
    (folder / "gpt3_outputs.json").write_text(json.dumps(gpt3, indent=1))


def _reviews(folder: Path) -> None:
    """Write 80 reviews a pair; three of each state no scores, which somebody put in by hand."""
    for name, mine, other in (("alpaca-13b", (7.0, 8.5), 7), ("bard", (8.0, 8.0), 17)):
        rows = []
        for number in range(1, 81):
            first, second = mine
            second += -0.5 if number <= other else 0.0  # sums to the published ratio
            text = f"{first:g} {second:g}\nThe second answer names more."
            if number in (68, 69, 70):
                text = "First, I solve the problem: 5 * 8 - 4 + 3 = 39.\n\nBoth come close."
            rows.append({
                "review_id": f"r{number}", "question_id": number, "answer1_id": f"a{number}",
                "answer2_id": f"b{number}", "text": text, "score": [first, second],
                "reviewer_id": "gpt-4-0328-preview", "metadata": {},
            })  # fmt: skip
        _lines(folder / f"{name}_vs_vicuna-13b.jsonl", rows)


def _captions(folder: Path) -> None:
    """Write captions whose words are as unevenly frequent as in language."""
    draw = np.random.default_rng(0)

    def words(base: tuple[str, ...], size: int) -> list[str]:
        every = [*base, *(f"{word}{end}" for end in ("let", "wood", "ing") for word in base)]
        weights = 1 / np.arange(1, len(every) + 1) ** 1.3
        return [every[n] for n in draw.choice(len(every), size, p=weights / weights.sum())]

    things, colours, places, others = (
        words(base, CAPTIONS) for base in (THINGS, COLOURS, PLACES, THINGS[::-1])
    )
    rows = [
        {"id": str(number), "caption": f"A {colour} {thing} and a {other} on the {place}."}
        for number, (thing, colour, place, other) in enumerate(
            zip(things, colours, places, others, strict=True), 1
        )
    ]
    _lines(folder / "scienceqa_captions.jsonl", rows)


def _photographs(folder: Path) -> None:
    """Write pictures that are smooth with sharp edges here and there, as photographs are."""
    for name, (width, height), progressive in (
        ("field", (570, 380), False), ("water", (1000, 667), True),
    ):  # fmt: skip
        y, x = np.mgrid[:height, :width] / height
        light = 0.5 + 0.3 * np.sin(3 * x + 2 * y) + 0.1 * np.sin(40 * x * y)
        light[(x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.04] *= 0.4
        pixels = np.stack([light, 0.8 * light + 0.1 * y, 0.9 - 0.6 * light], -1)
        image = Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))
        image.save(folder / f"{name}.jpg", quality=90, progressive=progressive)


_KINDS: dict[str, Callable[[Path], None]] = {
    "coco80": _coco, "llava_bench_coco": _bench, "scienceqa": _science, "judge_reviews": _reviews,
    "captions": _captions, "images": _photographs,
}  # fmt: skip
