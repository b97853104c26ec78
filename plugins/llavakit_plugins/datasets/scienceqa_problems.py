"""ScienceQA (arXiv 2209.09513): its problems, how LLaVA asks them, and how answers are read.

A format is `INPUT-OUTPUT` in letters: Q question, C context, M options, L lecture, E solution,
A answer. `QCM-LEA` asks question, context and options, and expects lecture, solution and answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from llavakit import DataError
from llavakit.contracts.data import IMAGE
from llavakit_plugins.datasets.image_files import inside
from llavakit_plugins.datasets.rows import Row, listed, read_json, text_of

LETTERS = "ABCDE"
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
"""Table 7 of the paper: subject, modality of the context, grade, and all problems."""

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_STATED = re.compile(r"The answer is ([A-Z]).")  # the dot is any character, as in every scorer
_STATED_AFTER_REASONS = re.compile(r"###\s*ANSWER: ([A-Z])\b")
_INPUT = re.compile(r"(?=.*Q)(?=.*M)(?!.*(.).*\1)[QCMLE]+")
_OUTPUT = re.compile(r"LEPA|(?!.*(.).*\1)(A[LE]*|[LE]*A)")


@dataclass(frozen=True)
class Problem:
    """One multiple-choice problem."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice, from 0."""
    hint: str
    """Context in words; often empty."""
    image: str | None
    """Name of the image file in the problem's own folder."""
    subject: str
    grade: int
    lecture: str
    solution: str
    split: str

    @property
    def letter(self) -> str:
        """The right answer."""
        return LETTERS[self.answer]

    @property
    def columns(self) -> Iterator[str]:
        """The columns of table 7 it counts in. A hint and an image are both context."""
        yield _SUBJECTS[self.subject]
        if self.hint:
            yield "TXT"
        if self.image:
            yield "IMG"
        if not self.hint and not self.image:
            yield "NO"
        yield "G1-6" if self.grade <= 6 else "G7-12"
        yield "Avg"

    def image_path(self, folder: Path, where: str) -> Path:
        """Return the image below `folder`: in `SPLIT/ID/`, as it is released, or in `ID/`."""
        name = f"{self.id}/{self.image}"
        released = inside(folder, f"{self.split}/{name}", where)
        return released if self.split and isfile(released) else inside(folder, name, where)


def read_problems(path: Path, split: str | None = None) -> dict[str, Problem]:
    """Return the problems of a `problems.json` by id, those of one split where it is given.

    A problem that names no split belongs to every one. Raises DataError naming the problem that
    cannot be used, and where the split has none.
    """
    table = read_json(path)
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path} holds no problems; ScienceQA's problems.json is one JSON object")
    problems = (
        _problem(identity, row, f"problem `{identity}` of {path}")
        for identity, row in table.items()
        if split is None or not isinstance(row, dict) or row.get("split", split) == split
    )
    found = {problem.id: problem for problem in problems}
    if not found:
        splits = sorted({str(row.get("split")) for row in table.values()})
        raise DataError(f"{path} has no problem of split `{split}`; it has {listed(splits)}")
    return found


def _problem(identity: str, row: Any, where: str) -> Problem:
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object; fix or remove it")
    choices, answer, image = row.get("choices"), row.get("answer"), row.get("image")
    if not isinstance(choices, list) or not 1 <= len(choices) <= len(LETTERS):
        raise DataError(f"{where}: `choices` is a list of 1 to {len(LETTERS)}, got {choices!r:.60}")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: `answer` is the place of a choice, from 0, got {answer!r:.60}")
    if image is not None and not isinstance(image, str):
        raise DataError(f"{where}: `image` is a file's name or null, got {image!r:.60}")
    subject, grade = text_of(row, "subject", where), text_of(row, "grade", where)
    number = re.fullmatch(r"grade(\d+)", grade)
    if subject not in _SUBJECTS or number is None:
        raise DataError(
            f"{where}: needs a `subject` of {', '.join(_SUBJECTS)} and a `grade` such as grade3, "
            f"got {subject!r:.40}, {grade!r:.40}"
        )
    return Problem(
        id=identity,
        question=text_of(row, "question", where),
        choices=tuple(map(str, choices)),
        answer=answer,
        hint=_optional(row, "hint", where),
        image=image or None,
        subject=subject,
        grade=int(number[1]),
        lecture=_optional(row, "lecture", where),
        solution=_optional(row, "solution", where),
        split=_optional(row, "split", where),
    )


def _optional(row: Row, key: str, where: str) -> str:
    return "" if row.get(key) is None else text_of(row, key, where)


# -- how it is asked -------------------------------------------------------------------------------


def _check_format(text: str) -> str:
    asked, _, expected = text.partition("-")
    if not _INPUT.fullmatch(asked) or not _OUTPUT.fullmatch(expected):
        raise ValueError(
            "a format is INPUT-OUTPUT: letters of QCMLE with Q and M, then A with L and E in front "
            "or behind, or LEPA; for example QCM-LEA"
        )
    return text


Format = Annotated[str, AfterValidator(_check_format)]
"""How problems are asked and answered: `QCM-LEPA` is the paper's."""


def question_text(problem: Problem, form: str) -> str:
    """Return the text of the question; if there is an image, `<image>` is the last line."""
    lines = {
        "Q": f"{_QUESTION}{problem.question}",
        # `N/A` is what the original's prompts have for an empty context
        "C": f"Context: {problem.hint.strip() or 'N/A'}",
        "M": "Options: "
        + " ".join(f"({a}) {b}" for a, b in zip(LETTERS, problem.choices, strict=False)),
    }
    parts = re.findall(r"[LE]+|.", form.partition("-")[0])
    text = "\n".join(lines.get(part) or _because(problem, part) for part in parts)
    text = _converted(f"{text}\n", _QUESTION)
    return f"{text}\n{IMAGE}" if problem.image else text


def answer_text(problem: Problem, form: str) -> str:
    """Return the answer that the model is trained on.

    `AL` gives the lecture and `AE` the solution; the original's converter has them swapped.
    """
    output = form.partition("-")[2]
    if output == "LEPA":
        reasons = {"LECTURE": _lines(problem.lecture), "SOLUTION": _lines(problem.solution)}
        lines = [f"{name}: {text}" for name, text in reasons.items() if text.strip()]
        return _converted("\n".join([*lines, "###", f"ANSWER: {problem.letter}."]), _ANSWER)
    stated = f"The answer is {problem.letter}."
    if output == "A":
        text = stated
    elif output.startswith("A"):
        text = f"{stated} {_because(problem, output[1:])}"
    else:
        text = f"{_reasons(problem, output[:-1])} {stated}"
    return _converted(f"{_ANSWER}{text}", _ANSWER)


_QUESTION, _ANSWER, _BECAUSE = "Question: ", "Answer: ", "BECAUSE:"


def _because(problem: Problem, letters: str) -> str:
    return f"{_BECAUSE} {_reasons(problem, letters)}"


def _reasons(problem: Problem, letters: str) -> str:
    reasons = {"L": problem.lecture, "E": problem.solution}
    return _lines(" ".join(reasons[letter] for letter in letters))


def _lines(text: str) -> str:
    """Return a lecture or solution with its lines apart, where they are written as `\\n`."""
    return text.replace("\\n", "\n")


def _converted(text: str, label: str) -> str:
    """Return exactly the text that the original's converter writes, with its oddities.

    Double spaces are halved once, before the labels are removed; so if lecture and solution are
    empty, a space stays before the answer. Labels are removed at any position, and so is
    `BECAUSE:` if no reason follows the last one.
    """
    text = text.replace("  ", " ").strip()
    if text.endswith(_BECAUSE):
        text = text.replace(_BECAUSE, "").strip()
    return text.replace(label, "") if text.startswith(label) else text


# -- what an answer says ---------------------------------------------------------------------------


def stated_letter(text: str) -> str | None:
    """Return the letter that an answer states; None if it states none, or several.

    Accepted are a bare letter, `X. ` at the beginning, `The answer is X.` exactly once, and
    `ANSWER: X` behind the `###` of the format LEPA.
    """
    if text in tuple(LETTERS):
        return text
    # the order of the rules is that of the original's eval_science_qa.py
    if text[1:3] == ". " and text[0] in LETTERS:
        return text[0]
    for pattern in (_STATED, _STATED_AFTER_REASONS):
        found = pattern.findall(text)
        if len(found) == 1:
            return str(found[0])
    return None


def read_letter(text: str) -> int | None:
    """Return the index in the alphabet, from 0, of the letter that an answer states; or None.

    The letter may not be one of the choices: then it counts as a wrong answer.
    """
    letter = stated_letter(text)
    return None if letter is None else ord(letter) - ord("A")


def read_choice(text: str, problem: Problem) -> int | None:
    """Return the index of the choice that an answer states; None if it states no choice."""
    return within(read_letter(text), problem)


def within(index: int | None, problem: Problem) -> int | None:
    """Return the index if it is that of a choice, else None."""
    return index if index is not None and index < len(problem.choices) else None
