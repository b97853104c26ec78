"""The benchmark `facts`: what is stated, what is true, what is missing; by hand-made scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavakit import Benchmark, DataError, Registry, Use
from llavakit_plugins.evaluation.benchmarks.facts import facts_in, scene_facts
from llavakit_plugins.generation.contexts import read_contexts, write_contexts
from llavakit_plugins.generation.scenes import compose


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("The left shows a red three.", {("left colour", "red"), ("left holds", "three")}),
        (
            "At the left a red three and at the top a blue zero on a pink canvas.",
            {
                ("left colour", "red"), ("left holds", "three"), ("top colour", "blue"),
                ("top holds", "zero"), ("canvas", "pink"),
            },
        ),
        ("The canvas is white with two digits.", {("canvas", "white"), ("count", "two")}),
        ("No, the bottom is empty.", {("bottom holds", "empty")}),
        ("There are three digits.", {("count", "three")}),
        (
            "The digits are nine and nine, so the sum is eighteen.",
            {("digit 1", "nine"), ("digit 2", "nine"), ("sum", "eighteen")},
        ),
        (
            "The largest is six, because the digits are six and two and one.",
            {("largest", "six"), ("digit 1", "six"), ("digit 2", "two"), ("digit 3", "one")},
        ),
        ("The digit is seven, so it is odd.", {("digit 1", "seven"), ("parity", "odd")}),
        ("It is even, because the digit is two.", {("digit 1", "two"), ("parity", "even")}),
        ("What a lovely picture!", set()),
        ("", set()),
    ],
)  # fmt: skip
def test_the_facts_of_a_text(text: str, facts: set[tuple[str, str]]) -> None:
    assert facts_in(text) == facts
    assert facts_in(text.upper()) == facts


def test_a_scene_s_facts_are_those_it_was_drawn_from(tmp_path: Path) -> None:
    scenes = [scene for _, scene in zip(range(40), compose("test", 5, 0), strict=False)]
    path = tmp_path / "c.jsonl"
    write_contexts(path, [s.context(f"{n}", f"{n}.png") for n, s in enumerate(scenes)])
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for scene, context in zip(scenes, read_contexts(path), strict=True):
        places = {digit.place: digit for digit in scene.digits}
        expected = {("canvas", scene.canvas), ("count", words[len(scene.digits)])}
        for place in ("top", "left", "right", "bottom"):
            if digit := places.get(place):
                expected |= {(f"{place} colour", digit.colour)}
                expected |= {(f"{place} holds", words[digit.value])}
            else:
                expected |= {(f"{place} holds", "empty")}
        listed = {(f"digit {n}", words[d.value]) for n, d in enumerate(scene.digits, start=1)}
        assert scene_facts(context) == expected | listed


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two scenes, and a teacher's conversation, detail and reasoning about each."""
    captions = {
        "a.png": "At the left a red three and at the top a blue five on a pink canvas.",
        "b.png": "At the right a green two on a white canvas.",
    }
    contexts = [
        {"id": name, "image": name, "captions": [caption], "instances": []}
        for name, caption in captions.items()
    ]
    (tmp_path / "scenes.jsonl").write_text("".join(json.dumps(c) + "\n" for c in contexts))
    says = {
        "conversation": ("The left shows a red three.", "The right shows a green two."),
        "detail": (
            "The canvas is pink with two digits. The left shows a red three. "
            "The top shows a blue five.",
            "The canvas is white with one digit. The right shows a green two.",
        ),
        "reasoning": (
            "The digits are three and five, so the sum is eight.",
            "The digit is two, so it is even.",
        ),
    }
    from PIL import Image

    for name in captions:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for kind, answers in says.items():
        rows = [
            {
                "id": f"{name}-{kind}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is there?"},
                    {"from": "gpt", "value": answer},
                ],
            }
            for name, answer in zip(captions, answers, strict=True)
        ]
        (tmp_path / f"{kind}.json").write_text(json.dumps(rows))
    return tmp_path


def benchmark(world: Path, **options: Any) -> Benchmark:
    data = [
        {"use": "conversations", "kind": kind, "path": f"{world}/{kind}.json"}
        for kind in ("conversation", "detail", "reasoning")
    ]
    table = {"use": "facts", "data": data, "contexts": f"{world}/scenes.jsonl", **options}
    return Registry.installed().build(Use[Benchmark].model_validate(table))


def test_the_teacher_s_own_answers_score_a_hundred(world: Path) -> None:
    judge = benchmark(world)
    questions = judge.questions()
    score = judge.score(questions, [question.truth for question in questions])
    assert score.metrics == {
        "relative": 100.0,
        "relative_conversation": 100.0,
        "relative_detail": 100.0,
        "relative_reasoning": 100.0,
        "conclusion": 1.0,
    }
    assert all(score.right)


def test_answers_are_scored_by_what_is_true_and_what_is_missing(world: Path) -> None:
    judge = benchmark(world)
    questions = judge.questions()
    assert [question.id for question in questions] == [
        f"{name}-{kind}" for kind in ("conversation", "detail", "reasoning")
        for name in ("a.png", "b.png")
    ]  # fmt: skip
    answers = [
        "The left shows a red four.",  # one of two is true, one of two is there: 5
        "There is a green two at the right, on a white canvas.",  # the place comes last: see below
        "The canvas is pink.",  # true; one of six is there: 2 * 1 * 1/6 / (7/6)
        "",  # nothing
        "The digits are three and five, so the sum is nine.",  # two of three, two of three
        "It is even, because the digit is four.",  # one of two, one of two
    ]
    score = judge.score(questions, answers)
    one_of_six = 10 * 2 * (1 / 6) / (1 + 1 / 6)
    # "the canvas is white" is true, but not what was asked: nothing of the asked is there
    marks = [5.0, 0.0, one_of_six, 0.0, 10 * 2 / 3, 5.0]
    assert score.metrics["relative"] == pytest.approx(100 * sum(marks) / 60)
    assert score.metrics["relative_conversation"] == pytest.approx(25.0)
    assert score.metrics["relative_detail"] == pytest.approx(100 * one_of_six / 20)
    assert score.metrics["relative_reasoning"] == pytest.approx(100 * (5 + 20 / 3) / 20)
    assert score.metrics["conclusion"] == 0.5
    assert not any(score.right)


def test_saying_everything_is_no_way_to_be_complete(world: Path) -> None:
    """A list of every digit and colour holds the right ones, and is mostly false."""
    judge = benchmark(world)
    questions = judge.questions()
    flood = " ".join(
        f"The left shows a {colour} {digit}."
        for colour in ("red", "green", "blue", "black")
        for digit in ("one", "two", "three", "four", "five", "six")
    )
    score = judge.score(questions[:1], [flood])
    assert score.metrics["relative"] == pytest.approx(100 * 2 * 0.2 / 1.2)


def test_a_limit_draws_the_same_questions_each_time(world: Path) -> None:
    drawn = [q.id for q in benchmark(world, limit=1, seed=3).questions()]
    assert len(drawn) == 3
    assert drawn == [q.id for q in benchmark(world, limit=1, seed=3).questions()]
    assert any(
        drawn != [q.id for q in benchmark(world, limit=1, seed=s).questions()] for s in range(9)
    )


def test_what_cannot_be_judged_is_named(world: Path) -> None:
    path = world / "detail.json"
    rows = json.loads(path.read_text())
    rows[1]["conversations"][1]["value"] = "A dog sleeps."
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"sample `b\.png-detail` states no fact"):
        benchmark(world).questions()
    (world / "scenes.jsonl").write_text((world / "scenes.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"sample `b\.png-conversation` shows no scene of"):
        benchmark(world).questions()
