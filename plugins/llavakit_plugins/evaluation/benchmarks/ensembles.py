"""Two models' answers to ScienceQA as one: complement and judge (paper, section 5.2).

Nothing is drawn at random. Answers are places in the alphabet: None where none is stated. A letter
that is none of the choices is an answer as any other, and wrong: as in the original, nothing else
is taken in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from llavakit import Message
from llavakit.contracts.data import IMAGE
from llavakit_plugins.datasets.scienceqa_problems import Problem, question_text

Ensemble = Literal["complement", "judge"]
Choices = Sequence[int | None]
"""What `read_letter` makes of answers, one a problem."""

_SYSTEM = (
    "You settle multiple-choice questions that two assistants answer differently. Either may be "
    "wrong, and so may both. Think about the question yourself, weigh their reasons, and end with "
    "one line that says: The answer is X. Put the letter of an option for X, and write that "
    "sentence only once."
)


def complement(ours: Choices, second: Choices) -> list[int | None]:
    """Return the second model's answers, and ours where it states none."""
    return [a if b is None else b for a, b in zip(ours, second, strict=True)]


def differing(ours: Choices, second: Choices) -> list[int]:
    """Return the places at which the two differ; where neither states an answer they don't."""
    pairs = enumerate(zip(ours, second, strict=True))
    return [index for index, (a, b) in pairs if a != b]


def judged(ours: Choices, second: Choices, verdicts: Mapping[int, int | None]) -> list[int | None]:
    """Return what both say, and the verdict where they differ.

    `verdicts` has the judge's answer by place. Where it has none, or states none, ours counts, as
    in the original.
    """
    final = list(ours)
    for index in differing(ours, second):
        verdict = verdicts.get(index)
        if verdict is not None:
            final[index] = verdict
    return final


def upper_bound(problems: Sequence[Problem], ours: Choices, second: Choices) -> list[int | None]:
    """Return the right choice wherever either has it, else ours."""
    rows = zip(problems, ours, second, strict=True)
    return [b if b == problem.answer else a for problem, a, b in rows]


def judge_messages(problem: Problem, ours: str, second: str) -> tuple[Message, ...]:
    """Return what the judge is asked, in our own words: the question and both answers.

    The judge sees no image, as in the paper.
    """
    question = question_text(problem, "QCM-A").replace(IMAGE, "").strip()
    parts = {"Question": question, "First assistant": ours, "Second assistant": second}
    text = "\n\n".join(f"{name}:\n{said.strip() or '(no answer)'}" for name, said in parts.items())
    return Message("system", _SYSTEM), Message("user", text)
