"""Combines two models' answers to ScienceQA: complement and judge (arXiv 2304.08485, section 5.2).

Nothing is random. An answer is the index of its letter in the alphabet, or None if it states no
letter. A letter that is not one of the choices counts as a wrong answer and is not replaced, as in
the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from llavakit import Message
from llavakit.contracts.data import IMAGE
from llavakit_plugins.datasets.scienceqa_problems import Problem, question_text

Ensemble = Literal["complement", "judge"]
Choices = Sequence[int | None]
"""The results of `read_letter`, one for each problem."""

_SYSTEM = (
    "You settle multiple-choice questions that two assistants answer differently. Either may be "
    "wrong, and so may both. Think about the question yourself, weigh their reasons, and end with "
    "one line that says: The answer is X. Put the letter of an option for X, and write that "
    "sentence only once."
)


def complement(ours: Choices, second: Choices) -> list[int | None]:
    """Return the second model's answers, and ours if it states none."""
    return [a if b is None else b for a, b in zip(ours, second, strict=True)]


def differing(ours: Choices, second: Choices) -> list[int]:
    """Return the indices of problems on which the two differ. Two missing answers do not differ."""
    pairs = enumerate(zip(ours, second, strict=True))
    return [index for index, (a, b) in pairs if a != b]


def judged(ours: Choices, second: Choices, verdicts: Mapping[int, int | None]) -> list[int | None]:
    """Return the common answer, or the judge's verdict if the two differ.

    `verdicts` holds the judge's answers by index of the problem. Without a verdict ours counts, as
    in the original.
    """
    final = list(ours)
    for index in differing(ours, second):
        verdict = verdicts.get(index)
        if verdict is not None:
            final[index] = verdict
    return final


def upper_bound(problems: Sequence[Problem], ours: Choices, second: Choices) -> list[int | None]:
    """Return the right choice if either model has it, else ours: the best possible ensemble."""
    rows = zip(problems, ours, second, strict=True)
    return [b if b == problem.answer else a for problem, a, b in rows]


def judge_messages(problem: Problem, ours: str, second: str) -> tuple[Message, ...]:
    """Return the judge's prompt, in our own words: the question and both answers.

    The judge gets no image, as in the paper.
    """
    # the question part alone: lecture and solution would tell the judge the answer
    question = question_text(problem, "QCM-A").replace(IMAGE, "").strip()
    parts = {"Question": question, "First assistant": ours, "Second assistant": second}
    text = "\n\n".join(f"{name}:\n{said.strip() or '(no answer)'}" for name, said in parts.items())
    return Message("system", _SYSTEM), Message("user", text)
