"""The benchmarks: what they ask, how they score, and that a judge is asked nothing twice."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from tests.plugins.evaluation.conftest import PROBLEMS
from tests.runs import run_in

import llavakit.testing
from llavakit import Benchmark, ChatModel, DataError, Message, Registry, Stopped
from llavakit_plugins.evaluation.benchmarks.pope import original_answer, strict_answer
from llavakit_plugins.evaluation.vqa_text import normalise, vqa_accuracy


class Judge(ChatModel):
    """Gives the reference 8 and the candidate 8 where they say the same, else 2."""

    name = "judge"
    asked: ClassVar[list[str]] = []
    replies: ClassVar[Mapping[str, str]] = {}
    """What is said instead, by a text that the question holds."""
    dies_at: ClassVar[int | None] = None

    def complete(self, messages: Sequence[Message]) -> str:
        text = messages[-1].content
        if len(Judge.asked) == Judge.dies_at:
            raise Stopped
        Judge.asked.append(text)
        for part, reply in Judge.replies.items():
            if part in text:
                return reply
        first, second = (
            re.search(rf"\[Assistant {n}\]\n(.*?)\n\n\[End of Assistant {n}\]", text, re.S)[1]  # type: ignore[index]
            for n in (1, 2)
        )
        return f"8 {8 if first == second else 2}\nbecause"


@pytest.fixture(autouse=True)
def _fresh_judge() -> None:
    Judge.asked, Judge.replies, Judge.dies_at = [], {}, None


def build(name: str, **options: Any) -> Benchmark:
    registry = Registry.installed()
    benchmark = registry.get(Benchmark, name)
    stated = benchmark.Options.model_validate(options)
    try:
        return benchmark(stated, build=lambda use: Judge())  # type: ignore[call-arg]
    except TypeError:
        return benchmark(stated)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small file of each format, known to the contracts below."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for number in range(3):
        llavakit.testing.make_picture(number).save(folder / f"{number}.png")
    categories = ("conv", "detail", "complex")
    write(
        folder / "questions.jsonl",
        [
            {
                "question_id": number,
                "image": f"{number % 3}.png",
                "text": f"What is it, {number}?",
                "category": categories[number % 3],
            }
            for number in range(6)
        ],
    )
    write(
        folder / "references.jsonl",
        [{"question_id": number, "text": f"It is {number}."} for number in reversed(range(6))],
    )
    boxes = [{"category": "cat", "bbox": [0.25, 0.5, 0.12345, 1.0]}]
    contexts: list[dict[str, Any]] = [
        {"id": "0", "image": "0.png", "captions": ["A cat.", "One cat."], "instances": boxes},
        {"image": "1.png", "caption": "A long caption."},
        {"image": "2.png", "captions": ["Two."]},
    ]
    write(folder / "contexts.jsonl", contexts)
    objects = ["dog", "cat", "car"]
    write(
        folder / "pope.jsonl",
        [
            {
                "question_id": number,
                "image": f"{number % 3}.png",
                "text": f"Is there a {objects[number % 3]} in the image?",
                "category": ("random", "popular")[number // 3],
                "label": ("yes", "no")[number % 2],
            }
            for number in range(6)
        ],
    )
    write(
        folder / "vqa.jsonl",
        [
            {"question_id": 0, "image": "0.png", "text": "How many?", "answers": ["2"] * 10},
            {"question_id": 1, "image": "1.png", "text": "Colour?", "answer": "dark-red"},
        ],
    )
    rows = {name: row for name, row in PROBLEMS.items() if row["split"] == "test"}
    (folder / "problems.json").write_text(json.dumps(rows))
    (folder / "13").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "13" / "image.png")
    Small.folder = folder
    return folder


class Small(llavakit.testing.BenchmarkContract):
    """What the contracts here have in common; `files` are options that name one of the folder's."""

    folder: ClassVar[Path]
    component: ClassVar[str]
    files: ClassVar[Mapping[str, str]]
    more: ClassVar[Mapping[str, Any]] = {}

    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {**{key: self.folder / name for key, name in self.files.items()}, **self.more}

    def build(self) -> Benchmark:
        return build(self.component, **self.options)


class TestScienceQA(Small):
    component = "scienceqa"
    files: ClassVar = {"problems": "problems.json"}


class TestPope(Small):
    component = "pope"
    files: ClassVar = {"questions": "pope.jsonl"}


class TestVqa(Small):
    component = "vqa"
    files: ClassVar = {"questions": "vqa.jsonl"}


BENCH: Mapping[str, str] = {
    "questions": "questions.jsonl",
    "references": "references.jsonl",
    "contexts": "contexts.jsonl",
}


class TestLlavaBench(Small):
    component = "llava-bench"
    metric = "relative_all"
    files: ClassVar = BENCH
    more: ClassVar = {"judge": {"use": "judge"}}


# -- LLaVA-Bench -----------------------------------------------------------------------------------


def bench(folder: Path, **more: Any) -> Benchmark:
    files = {key: folder / name for key, name in BENCH.items()}
    return build("llava-bench", **{**files, "judge": {"use": "judge"}, **more})


def test_the_judge_is_told_context_question_and_the_reference_first(place: Path) -> None:
    benchmark = bench(place, limit=1)
    benchmark.score(benchmark.questions(), ["my answer"])
    (text,) = Judge.asked
    expected = [
        "[Context]\nA cat.\nOne cat.\n\ncat: [0.25, 0.5, 0.123, 1.0]",
        "[Question]\nWhat is it, 0?",
        "[Assistant 1]\nIt is 0.",
        "[End of Assistant 1]",
        "[Assistant 2]\nmy answer",
        "[End of Assistant 2]",
        "[System]\n",
    ]
    places = [text.index(part) for part in expected]
    assert places == sorted(places)


def test_the_relative_score_is_a_ratio_of_means_over_questions_that_parse(place: Path) -> None:
    Judge.replies = {"it, 0": "8 4\n", "it, 1": "10 10", "it, 2": "good", "it, 3": "5 5.5"}
    benchmark = bench(place)
    score = benchmark.score(benchmark.questions(), ["x"] * 6)  # 4 and 5: 8 2
    reference, candidate = (8 + 10 + 5 + 8 + 8) / 5, (4 + 10 + 5.5 + 2 + 2) / 5
    assert score.metrics["relative_all"] == pytest.approx(100 * candidate / reference)
    assert score.metrics["relative_conv"] == pytest.approx(100 * 9.5 / 13)
    assert score.metrics["relative_complex"] == 25.0  # of the one question left
    assert score.metrics["unparsed"] == 1
    assert score.metrics["relative_low"] < score.metrics["relative_all"]
    assert score.metrics["relative_all"] < score.metrics["relative_high"]
    assert score.remarks[2] == "good"
    (table,) = score.sections
    assert "counted nowhere: `2`" in table.caption


def test_a_tolerant_reading_takes_what_is_meant_beyond_doubt(place: Path, tmp_path: Path) -> None:
    Judge.replies = {"it, 0": "\n**8/10** **4/10**\nwhy", "it, 1": "10 10", "it, 2": "8/9"}
    replies = run_in(tmp_path / "run")
    figures = {}
    for reading in ("first-line", "tolerant"):
        benchmark = bench(place, limit=3, reading=reading)
        score = benchmark.score_in(replies, benchmark.questions(), ["x"] * 3)
        figures[reading] = (score.metrics["relative_all"], score.metrics["unparsed"])
        lines = (replies.directory / "reviews.jsonl").read_text().splitlines()
        stored = [json.loads(line)["tuple"] for line in lines]
        assert stored == [[8, 4] if reading == "tolerant" else None, [10, 10], None]
    assert figures == {"first-line": (100, 2), "tolerant": (pytest.approx(100 * 14 / 18), 1)}


def test_the_interval_is_the_bootstraps(place: Path) -> None:
    from llavakit_plugins.evaluation.reviews import Relative

    draw = np.random.default_rng(5)
    pairs = draw.integers(1, 11, (60, 2)).astype(float)
    found = Relative.of([(a, b) for a, b in pairs.tolist()])
    assert found is not None
    ratios = []
    for _ in range(4000):
        chosen = pairs[draw.integers(0, 60, 60)]
        ratios.append(100 * chosen[:, 1].mean() / chosen[:, 0].mean())
    low, high = np.percentile(ratios, (2.5, 97.5))
    assert found.low == pytest.approx(low, abs=2.5)
    assert found.high == pytest.approx(high, abs=2.5)


def test_swapped_positions_are_asked_and_averaged(place: Path) -> None:
    benchmark = bench(place, swap=True, limit=1)
    Judge.replies = {"[Assistant 1]\nIt is 0.": "8 4", "[Assistant 1]\nmine": "6 10"}
    score = benchmark.score(benchmark.questions(), ["mine"])
    assert len(Judge.asked) == 2
    assert score.metrics["reference"] == 9
    assert score.metrics["candidate"] == 5


def test_every_review_is_kept_and_nothing_is_asked_twice(place: Path, tmp_path: Path) -> None:
    benchmark = bench(place, swap=True, concurrency=1)
    questions, answers = benchmark.questions(), [f"Number {n}." for n in range(6)]
    Judge.dies_at = 5
    with pytest.raises(Stopped):
        benchmark.score_in(run_in(tmp_path), questions, answers)
    Judge.dies_at = None
    first = benchmark.score_in(run_in(tmp_path), questions, answers)
    assert len(Judge.asked) == len(set(Judge.asked)) == 12
    again = benchmark.score_in(run_in(tmp_path), questions, answers)
    assert len(Judge.asked) == 12
    assert dict(again.metrics) == dict(first.metrics)
    rows = [json.loads(line) for line in (tmp_path / "reviews.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert {row["question_id"] for row in rows} == set(range(6))
    other = [*answers[:5], "another answer"]
    benchmark.score_in(run_in(tmp_path), questions, other)
    assert len(Judge.asked) == 14  # what changed is asked again, both ways


def test_kept_reviews_score_the_same_by_the_command(
    place: Path, tmp_path: Path, llava_run: Any
) -> None:
    benchmark = bench(place, swap=True)
    Judge.replies = {"it, 2": "good"}
    answers = ["x", "It is 1.", "y", "z", "It is 4.", "w"]
    score = benchmark.score_in(run_in(tmp_path), benchmark.questions(), answers)
    data = json.loads(llava_run("score", "reviews", tmp_path / "reviews.jsonl", "--json").out)
    assert data["relative"] == pytest.approx(score.metrics["relative_all"])
    assert data["stored"]["unparsed"] == data["text"]["unparsed"] == ["2"]


def test_the_published_benchmark_is_read(shared: Path, tmp_path: Path) -> None:
    source = shared / "llava_bench_coco"
    rows = [json.loads(line) for line in (source / "questions.jsonl").read_text().splitlines()]
    (tmp_path / "images").mkdir()
    for name in {row["image"] for row in rows}:
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    names = sorted({row["image"] for row in rows})
    write(tmp_path / "contexts.jsonl", [{"image": name, "caption": name} for name in names])
    benchmark = build(
        "llava-bench",
        questions=source / "questions.jsonl",
        references=source / "gpt4_answers.jsonl",
        contexts=tmp_path / "contexts.jsonl",
        images=tmp_path / "images",
        judge={"use": "judge"},
    )
    questions = benchmark.questions()
    assert len(questions) == 90
    assert questions[0].id == 0
    assert questions[0].truth.startswith("The colors of the two suitcases")
    score = benchmark.score(questions, [question.truth for question in questions])
    assert score.metrics["relative_all"] == 100.0
    assert {"relative_conv", "relative_detail", "relative_complex"} <= set(score.metrics)


@pytest.mark.parametrize(
    ("file", "row", "said"),
    [
        ("references.jsonl", None, "has no answer to `0`"),
        ("contexts.jsonl", None, "says nothing of `0.png`"),
        ("contexts.jsonl", {"image": "0.png"}, "a context needs `caption`"),
        (
            "contexts.jsonl",
            {"image": "0.png", "caption": "c", "instances": [{}]},
            "an instance has",
        ),
        (
            "contexts.jsonl",
            {"image": "0.png", "caption": "c", "instances": [{"category": "", "bbox": [10**400]}]},
            "an instance has",
        ),
        ("contexts.jsonl", {"image": "0.png", "caption": "\ud83d"}, "half an emoji"),
        ("references.jsonl", {"question_id": 0, "text": "\ud83d"}, "half an emoji"),
        (
            "questions.jsonl",
            {"question_id": 9, "text": "x", "image": "0" * 5000},
            "images are missing",
        ),
        ("questions.jsonl", {"question_id": 1, "text": "x"}, "`1` is there more than once"),
        (
            "questions.jsonl",
            {"question_id": 9, "text": "x", "image": "no.png"},
            "images are missing",
        ),
        ("questions.jsonl", {"question_id": 9, "text": "x", "image": "../x"}, "lies outside"),
        ("questions.jsonl", {"question_id": 9}, "needs `text`"),
        ("questions.jsonl", {"text": "x"}, "needs `question_id`"),
    ],
)
def test_files_that_do_not_fit_are_named(
    place: Path, tmp_path: Path, file: str, row: Mapping[str, Any] | None, said: str
) -> None:
    for name in (*BENCH.values(), "0.png", "1.png", "2.png"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    rows = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
    first = next(i for i, r in enumerate(rows) if "0" in str(r.get("question_id", r.get("image"))))
    write(tmp_path / file, [*rows[:first], *([row] if row else []), *rows[first + 1 :]])
    with pytest.raises(DataError, match=said):
        bench(tmp_path)


# -- ScienceQA -------------------------------------------------------------------------------------


def test_scienceqa_asks_as_it_trains_and_scores_by_table_7(place: Path) -> None:
    benchmark = build("scienceqa", problems=place / "problems.json", format="QCM-LEA")
    word, bat = benchmark.questions()
    assert word.prompt == "Which word is a noun?\nContext: N/A\nOptions: (A) run (B) cat"
    assert bat.prompt.endswith("Options: (A) yes (B) no\n<image>")
    assert bat.images == (place / "13" / "image.png",)
    score = benchmark.score([word, bat], ["The answer is B.", "I think so."])
    assert score.right == [True, False]
    assert score.metrics["accuracy"] == 0.5
    assert score.metrics["without_choice"] == 1
    assert score.metrics["accuracy_LAN"] == 1
    assert score.metrics["accuracy_IMG"] == 0
    alone = build("scienceqa", problems=place / "problems.json", format="CQM-A", suffix="Letter!")
    assert alone.questions()[1].prompt.endswith("(B) no\nLetter!\n<image>")
    blind = build("scienceqa", problems=place / "problems.json", with_images=False)
    assert blind.questions()[1].images == ()


def test_scienceqas_judge_is_asked_where_the_two_differ(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "second.jsonl", [{"question_id": "12", "text": "The answer is A."}])
    stated = {"problems": place / "problems.json", "second": tmp_path / "second.jsonl"}
    benchmark = build("scienceqa", **stated, ensemble="judge", judge={"use": "judge"})
    Judge.replies = {"noun": "A cat is a thing. The answer is B.", "bat": "The answer is A."}
    answers = ["It runs. The answer is A.", "The answer is B."]
    score = benchmark.score_in(run_in(tmp_path / "run"), benchmark.questions(), answers)
    (text,) = Judge.asked  # both say A of the noun; the second says nothing of the bat
    assert "Is a bat a bird?" in text
    assert "The answer is B." in text
    assert "(no answer)" in text
    assert score.metrics["accuracy"] == 0.5
    assert score.metrics["accuracy_judge"] == 0
    assert score.metrics["accuracy_upper_bound"] == 0.5
    benchmark.score_in(run_in(tmp_path / "run"), benchmark.questions(), answers)
    assert len(Judge.asked) == 1
    # the letter C, which the bat's two choices have not, is an answer all the same, and wrong
    write(tmp_path / "third.jsonl", [{"question_id": "13", "text": "The answer is C."}])
    third = {**stated, "second": tmp_path / "third.jsonl"}
    outside = build("scienceqa", **third, ensemble="complement")
    assert outside.score(benchmark.questions(), answers).metrics["accuracy_complement"] == 0
    assert outside.score(benchmark.questions(), answers).metrics["accuracy_upper_bound"] == 0.5
    complement = build("scienceqa", **stated, ensemble="complement")
    assert complement.score(benchmark.questions(), answers).metrics["accuracy_complement"] == 0.5


@pytest.mark.parametrize(
    "more", [{"ensemble": "judge"}, {"judge": {"use": "judge"}}, {"second": "x"}]
)
def test_half_an_ensemble_is_refused(place: Path, more: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="state"):
        build("scienceqa", problems=place / "problems.json", **more)


# -- POPE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strict", "original"),
    [
        ("Yes", True, True),
        ("yes, there is a dog.", True, True),
        ("No, there is no dog. Yes.", False, False),
        ("There is not a dog", False, False),
        ("NO", False, True),  # the original minds case
        ("Not at all", False, True),
        ("no!", False, True),
        ("There is a dog.", None, True),  # it says neither
        ("Yes and no", None, False),
        ("", None, True),
        ("I see. No.", None, True),
        ("nothing", None, True),
        # a sentence ends at `.`, `!`, `?` and a line's end; to the original at `.` alone
        ("Yes! There is no doubt", True, False),
        ("Is there a dog? Yes", None, True),
        ("yes?! no", True, False),
        ("Yes\nThere is no cat, though", True, False),
        ("No\r\nBut yes, a cat", False, True),  # "No\r\nBut" is one word to the original
        ("no\u2028yes", False, True),
        ("\n\nNo", False, True),
        ("1. Yes, 2. no", True, True),
    ],
)
def test_pope_reads_strictly_and_as_the_original(
    text: str, strict: bool | None, original: bool
) -> None:
    assert strict_answer(text) is strict
    assert original_answer(text) is original


def test_popes_figures_are_the_originals_where_that_is_asked_for(
    place: Path, tmp_path: Path
) -> None:
    said = ["Yes! Of course", "NO", "no", "Perhaps"]
    rows = [
        {"question_id": n, "image": "0.png", "text": f"{n}?", "label": label, "category": "random"}
        for n, label in enumerate(["yes", "no", "no", "yes"])
    ]
    path = write(tmp_path / "pope.jsonl", rows)
    scores = {}
    for reading in ("strict", "original"):
        benchmark = build("pope", questions=path, images=place, reading=reading)
        scores[reading] = benchmark.score(benchmark.questions(), said)
    assert scores["strict"].right == [True, True, True, False]
    assert scores["original"].right == [True, False, True, True]  # yes, yes, no, yes
    for name, of_original in (("accuracy", 3 / 4), ("precision", 2 / 3), ("f1_random", 4 / 5)):
        assert scores["original"].metrics[name] == pytest.approx(of_original)
    for score in scores.values():
        assert score.metrics["original_accuracy"] == 3 / 4
        assert score.metrics["read_differently"] == 2
    assert scores["strict"].sections == scores["original"].sections


def test_popes_figures_are_scikit_learns(place: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [
        {
            "question_id": n, "image": "0.png", "text": f"Is there a {n} in it?",
            "label": draw.choice(["yes", "no"]), "category": draw.choice(["random", "popular"]),
        }
        for n in range(80)
    ]  # fmt: skip
    path = write(tmp_path / "pope.jsonl", rows)
    benchmark = build("pope", questions=path, images=place)
    said = [draw.choice(["Yes", "No, none.", "NO", "Perhaps"]) for _ in rows]
    metrics = benchmark.score(benchmark.questions(), said).metrics
    truths = [row["label"] == "yes" for row in rows]
    # an answer that says neither is wrong, and no "yes": the opposite of the truth for accuracy
    read = {"Yes": 1, "No, none.": 0, "NO": 0, "Perhaps": -1}
    values = [read[text] for text in said]
    assert metrics["accuracy"] == pytest.approx(accuracy_score([int(t) for t in truths], values))
    precision, recall, f1, _ = precision_recall_fscore_support(
        truths, [value == 1 for value in values], average="binary"
    )
    assert metrics["precision"] == pytest.approx(precision)
    assert metrics["recall"] == pytest.approx(recall)
    assert metrics["f1"] == pytest.approx(f1)
    assert metrics["yes_ratio"] == pytest.approx(said.count("Yes") / 80)
    assert metrics["silent"] == said.count("Perhaps")
    assert metrics["read_differently"] == said.count("Perhaps") + said.count("NO")
    loose = [text != "No, none." for text in said]
    assert metrics["original_accuracy"] == pytest.approx(accuracy_score(truths, loose))


def test_popes_labels_are_joined_by_image_and_question(place: Path, tmp_path: Path) -> None:
    questions, labels = [], []
    for number, (category, label) in enumerate(
        [("random", "yes"), ("random", "no"), ("popular", "no")]
    ):
        row = {"image": f"{number}.png", "text": f"Is there a {number}?"}
        suffix = "\nAnswer with one word."
        questions.append(
            {**row, "question_id": 10 + number, "category": category, "text": row["text"] + suffix}
        )
        labels.append((category, {**row, "question_id": 1, "label": label}))
    for category in ("random", "popular"):
        rows = [row for own, row in labels if own == category]
        numbered = [{**row, "question_id": n} for n, row in enumerate(rows, 1)]
        write(tmp_path / f"coco_pope_{category}.json", numbered[::-1])  # ids begin anew, no order
    path = write(tmp_path / "questions.jsonl", questions)
    benchmark = build("pope", questions=path, labels=tmp_path, images=place)
    assert [question.truth for question in benchmark.questions()] == ["yes", "no", "no"]
    write(tmp_path / "by_id.jsonl", [{"question_id": 10 + n, "label": "no"} for n in range(3)])
    benchmark = build("pope", questions=path, labels=tmp_path / "by_id.jsonl", images=place)
    assert [question.truth for question in benchmark.questions()] == ["no", "no", "no"]
    (tmp_path / "coco_pope_popular.json").write_text('{"question_id": 1, "label": "no"}')
    with pytest.raises(DataError, match="has no label for question `12`"):
        build("pope", questions=path, labels=tmp_path, images=place)
    with pytest.raises(DataError, match="has no `label`; add it, or state `labels`"):
        build("pope", questions=path, images=place)


# -- short answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # what the processor of EvalAI's VQA challenge gives (as lmms-eval 0.7.3 has it)
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("1,000", "1000"),
        ("1,000 people", "1000 people"),
        ("cat-dog", "cat dog"),
        ("cat - dog", "cat dog"),
        ("St. Paul", "st paul"),
        ("3.5", "3.5"),
        ("don't", "don't"),
        ("dont", "don't"),
        ("youre", "you're"),
        ("a man's hat", "man 's hat"),
        ("U.S.A.", "usa"),
        ('"stop"', "stop"),
        ("Yes, it is", "yes it is"),
        ("none", "0"),
        ("an apple / a pear", "apple pear"),
        ("he'dve", "he'd've"),
        ("what?", "what"),
        ("10:30", "10:30"),
        ("red\nblue", "red blue"),
        ("", ""),
        ("the", ""),
        ("'twas", "'twas"),
        ("1,5 - 2", "15 2"),
        ("(left)", "left"),
        ("no!!", "no"),
    ],
)
def test_answers_are_normalised_as_vqas_server_does(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_vqa_accuracy_is_the_mean_over_people_left_out() -> None:
    draw = random.Random(1)
    for _ in range(50):
        truths = [draw.choice(["red", "blue", "Green."]) for _ in range(10)]
        shares = []
        for left_out in range(10):
            others = [t for n, t in enumerate(truths) if n != left_out]
            shares.append(min(1.0, sum(t.lower().strip(".") == "green" for t in others) / 3))
        assert vqa_accuracy("a green", truths) == pytest.approx(float(np.mean(shares)))
    assert vqa_accuracy("Dogs", ["dogs"]) == 1.0
    assert vqa_accuracy("dog", ["dogs"]) == 0.0


def test_vqa_reads_answers_in_the_row_or_in_another_file(place: Path, tmp_path: Path) -> None:
    rows = [{"question_id": n, "image": f"{n}.png", "text": "?"} for n in range(2)]
    path = write(tmp_path / "q.jsonl", rows)
    people = [{"answer": "cat", "answer_confidence": "yes"}] * 3 + [{"answer": "dog"}] * 7
    truths = [{"question_id": 1, "answers": ["x"]}, {"question_id": 0, "answers": people}]
    other = write(tmp_path / "t.jsonl", truths)
    benchmark = build("vqa", questions=path, truths=other, images=place, suffix="")
    assert [question.truth for question in benchmark.questions()] == ["dog", "x"]
    score = benchmark.score(benchmark.questions(), ["Cat", "y"])
    assert score.metrics["accuracy"] == pytest.approx((3 * 2 / 3 + 7) / 10 / 2)
    assert score.metrics["exact_match"] == 0.5
    with pytest.raises(DataError, match="needs `answers`, a list, or `answer`"):
        build("vqa", questions=path, images=place)
    write(other, truths[:1])
    with pytest.raises(DataError, match="has no row for question `0`"):
        build("vqa", questions=path, truths=other, images=place)


def test_a_limit_takes_the_first(place: Path) -> None:
    for name, file in (("pope", "pope.jsonl"), ("vqa", "vqa.jsonl")):
        assert [q.id for q in build(name, questions=place / file, limit=1).questions()] == [0]
    assert len(build("scienceqa", problems=place / "problems.json", limit=1).questions()) == 1


def test_ids_keep_their_type(place: Path) -> None:
    pope, science = (
        build("pope", questions=place / "pope.jsonl"),
        build("scienceqa", problems=place / "problems.json"),
    )
    assert isinstance(pope.questions()[0].id, int)
    assert isinstance(science.questions()[0].id, str)
    assert replace(pope.questions()[0], id="0").id == "0"
