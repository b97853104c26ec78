"""ScienceQA's problems: their formats, their columns, and the data set to train on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.evaluation.conftest import PROBLEMS

import llavakit.testing
from llavakit import DataError, Dataset, Registry, Use
from llavakit.contracts.component import Options
from llavakit_plugins.datasets.scienceqa import ScienceQAOptions
from llavakit_plugins.datasets.scienceqa_problems import (
    LETTERS,
    answer_text,
    question_text,
    read_choice,
    read_problems,
    stated_letter,
)


@pytest.fixture(autouse=True)
def place(science: Path) -> None:
    TestScienceQA.folder = science


class TestScienceQA(llavakit.testing.DatasetContract):
    folder: Path

    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {"problems": self.folder / "problems.json"}

    def build(self) -> Dataset:
        return Registry.installed().build(Use[Dataset](use="scienceqa", **self.options))

    def expected(self) -> None:
        return None  # every row is compared with the converter's below


def build(folder: Path, **options: object) -> Dataset:
    stated = {"use": "scienceqa", "problems": folder / "problems.json", **options}
    use = Use[Dataset].model_validate(stated)
    return Registry.installed().build(use)


@pytest.mark.parametrize(
    ("form", "identity", "asked", "supervised"),
    [
        (
            "QCM-LEPA",
            "7",
            "What is ice?\nContext: N/A\nOptions: (A) a gas (B) a solid\n<image>",
            "LECTURE: Solids keep their shape.\nSOLUTION: Ice keeps its shape.\n###\nANSWER: B.",
        ),
        (
            "QCM-LEA",
            "7",
            "What is ice?\nContext: N/A\nOptions: (A) a gas (B) a solid\n<image>",
            "Solids keep their shape. Ice keeps its shape. The answer is B.",
        ),
        (
            "CQM-A",
            "9",
            "Context: Oslo is in Europe.\nQuestion: Where is Oslo?\n"
            "Options: (A) Norway (B) Peru (C) Chad",
            "The answer is A.",
        ),
        (
            "QCML-AE",
            "12",
            "Which word is a noun?\nContext: N/A\nOptions: (A) run (B) cat\n"
            "BECAUSE: A noun names a thing.",
            "The answer is B. BECAUSE: A cat is a thing.",
        ),
        (
            "QCEM-ALE",
            "9",
            "Where is Oslo?\nContext: Oslo is in Europe.\nBECAUSE: \n"
            "Options: (A) Norway (B) Peru (C) Chad",
            "The answer is A.",  # no reason, so no BECAUSE
        ),
        (
            "QCMLE-LEPA",
            "9",
            "Where is Oslo?\nContext: Oslo is in Europe.\nOptions: (A) Norway (B) Peru (C) Chad",
            "###\nANSWER: A.",
        ),
    ],
)
def test_every_format_is_the_converters(
    science: Path, form: str, identity: str, asked: str, supervised: str
) -> None:
    problem = read_problems(science / "problems.json")[identity]
    assert question_text(problem, form) == asked
    assert answer_text(problem, form) == supervised


# What the original's converter makes of these, by running it
@pytest.mark.parametrize(
    ("changes", "form", "asked", "supervised"),
    [
        ({}, "QCM-LEA", None, " The answer is A."),  # of three spaces two are left, and one goes
        ({}, "QCM-ELA", None, " The answer is A."),
        ({}, "QCM-LA", None, "The answer is A."),
        ({"lecture": "L."}, "QCM-LEA", None, "L. The answer is A."),
        ({"solution": "E."}, "QCM-LEA", None, "E. The answer is A."),
        ({"lecture": "\n"}, "QCM-LA", None, "\n The answer is A."),
        ({"lecture": " "}, "QCM-LEA", None, " The answer is A."),
        ({"lecture": "  ", "solution": " "}, "QCM-LEA", None, "  The answer is A."),
        ({"lecture": "a   b"}, "QCM-LEA", None, "a  b The answer is A."),
        ({"lecture": "a\\nb"}, "QCM-LA", None, "a\nb The answer is A."),
        ({"lecture": "Answer: yes."}, "QCM-LA", None, "yes. The answer is A."),
        ({"lecture": "BECAUSE:"}, "QCM-ALE", None, "The answer is A."),
        (
            {"question": "Which Question: it?"},
            "QCM-A",
            "Which it?\nContext: N/A\nOptions: (A) Norway (B) Peru (C) Chad",
            "The answer is A.",
        ),
        (
            {"question": "Which Question: it?"},
            "CQM-A",  # it does not begin with `Question: `
            "Context: N/A\nQuestion: Which Question: it?\nOptions: (A) Norway (B) Peru (C) Chad",
            "The answer is A.",
        ),
    ],
)
def test_spaces_and_labels_are_left_as_the_converter_leaves_them(
    science: Path, changes: dict[str, Any], form: str, asked: str | None, supervised: str
) -> None:
    row = {**PROBLEMS["9"], "hint": "", "lecture": "", "solution": "", **changes}
    (science / "problems.json").write_text(json.dumps({"9": row}))
    problem = read_problems(science / "problems.json")["9"]
    assert answer_text(problem, form) == supervised
    assert asked in (None, question_text(problem, form))


@pytest.mark.parametrize("form", ["QCM", "QCM-", "QC-A", "QQM-A", "QCM-LAE", "QCM-LE", "qcm-a", ""])
def test_an_unknown_format_is_refused(form: str, science: Path) -> None:
    with pytest.raises(ValueError, match="for example QCM-LEA"):
        ScienceQAOptions(problems=science / "problems.json", format=form)
    assert issubclass(ScienceQAOptions, Options)


def test_what_is_learned_is_what_the_scorer_reads(shared: Path) -> None:
    problems = read_problems(shared / "scienceqa" / "problems.json", "test")
    assert len(problems) == 180
    for problem in problems.values():
        for form in ("QCM-A", "QCM-LEA", "QCM-ALE", "QCM-AEL", "QCM-ELA", "QCM-LEPA"):
            assert read_choice(answer_text(problem, form), problem) == problem.answer


def test_columns_are_counted_as_scienceqa_counts_them(shared: Path) -> None:
    file = shared / "scienceqa" / "problems.json"
    rows = json.loads(file.read_text()).values()
    expected: Counter[str] = Counter()
    for row in rows:
        expected[{"n": "NAT", "s": "SOC", "l": "LAN"}[row["subject"][0]]] += 1
        expected["TXT"] += len(row["hint"]) > 0
        expected["IMG"] += row["image"] is not None
        expected["NO"] += row["image"] is None and row["hint"] == ""
        expected["G1-6" if int(row["grade"][5:]) < 7 else "G7-12"] += 1
        expected["Avg"] += 1
    assert Counter(c for p in read_problems(file).values() for c in p.columns) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("C. the third", "C"),
        ("It rains. The answer is D.", "D"),
        ("The answer is A. BECAUSE: x", "A"),
        ("LECTURE: x\n###\nANSWER: E.", "E"),
        ("The answer is A. No: The answer is B.", None),
        ("the answer is A.", None),
        ("The answer is A", None),  # as in the original, something has to follow
        ("b", None),
        ("F", None),
        ("", None),
    ],
)
def test_an_answer_states_one_letter_or_none(text: str, letter: str | None) -> None:
    assert stated_letter(text) == letter


def test_a_letter_beyond_the_choices_is_no_choice(science: Path) -> None:
    problem = read_problems(science / "problems.json")["7"]
    assert [read_choice(letter, problem) for letter in LETTERS] == [0, 1, None, None, None]
    assert read_choice("The answer is Z.", problem) is None


def test_samples_carry_their_images_behind_the_question(science: Path) -> None:
    with_image, without = build(science, format="QCM-LEA")
    assert with_image.turns[0].text.endswith("\n<image>")
    assert with_image.images == (science / "train" / "7" / "image.png",)
    assert without.images == ()
    assert "<image>" not in without.turns[0].text
    assert [sample.id for sample in build(science, split="test")] == ["12", "13"]
    flat = science.parent / "flat"
    (science / "train").rename(flat)
    assert build(science, images=flat)[0].images == (flat / "7" / "image.png",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 2}, "problem `7` .*`answer` is the place of a choice, from 0, got 2"),
        ({"answer": None}, "`answer` is the place of a choice"),
        ({"choices": []}, "`choices` is a list of 1 to 5"),
        ({"choices": list("abcdef")}, "`choices` is a list of 1 to 5"),
        ({"subject": "art"}, "needs a `subject` of natural science"),
        ({"grade": "third"}, "a `grade` such as grade3"),
        ({"question": None}, "needs `question`"),
        ({"image": 3}, "`image` is a file's name or null"),
        ({"image": "../../x.png"}, "lies outside"),
        ({"image": "none.png"}, "image .*none.png of problem `7`.* is missing"),
    ],
)
def test_a_problem_that_cannot_be_used_is_named(
    science: Path, change: dict[str, Any], said: str
) -> None:
    rows = {**PROBLEMS, "7": {**PROBLEMS["7"], **change}}
    (science / "problems.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=said):
        build(science)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds no problems"),
        ('{"1": 4}', "problem `1` .* is no JSON object"),
        ('{"1": {}, "1": {}}', "`1` is there more than once"),
        ('{\n"1": }', r"problems.json:2:6: not valid JSON"),
        ('{"1": {"split": "minival"}}', "no problem of split `train`; it has `minival`"),
    ],
)
def test_a_file_that_is_not_scienceqas_is_refused(science: Path, text: str, said: str) -> None:
    (science / "problems.json").write_text(text)
    with pytest.raises(DataError, match=said):
        build(science)
