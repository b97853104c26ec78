"""Table 7 of arXiv 2304.08485: right answers by subject, modality of the context, and grade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavakit.contracts.sections import Table
from llavakit_plugins.datasets.scienceqa_problems import COLUMNS, Problem, within


@dataclass(frozen=True)
class Count:
    """Right answers and problems of one column."""

    correct: int
    count: int

    @property
    def percent(self) -> float | None:
        """Share of right answers in percent; None if no problem belongs to the column."""
        return 100 * self.correct / self.count if self.count else None


@dataclass(frozen=True)
class Result:
    """The scores of one set of answers."""

    columns: Mapping[str, Count]
    choices: Mapping[str, int | None]
    """Choices by problem id; None, which is wrong, if the answer states no choice."""

    @classmethod
    def of(cls, problems: Sequence[Problem], choices: Sequence[int | None]) -> Result:
        """Return the scores of these choices, one for each problem."""
        totals = {name: [0, 0] for name in COLUMNS}
        for problem, choice in zip(problems, choices, strict=True):
            # a problem belongs to several columns (subject,
            # context, grade), and always to the average
            for column in problem.columns:
                totals[column][0] += choice == problem.answer
                totals[column][1] += 1
        return cls(
            {name: Count(*numbers) for name, numbers in totals.items()},
            {problem.id: choice for problem, choice in zip(problems, choices, strict=True)},
        )

    @classmethod
    def of_letters(cls, problems: Sequence[Problem], indices: Sequence[int | None]) -> Result:
        """Return the scores of indices in the alphabet; one beyond the choices is no choice."""
        pairs = zip(indices, problems, strict=True)
        return cls.of(problems, [within(index, problem) for index, problem in pairs])

    @property
    def accuracy(self) -> float:
        """Share of all problems that are answered right, 0 to 1."""
        total = self.columns["Avg"]
        return total.correct / total.count

    @property
    def unparsable(self) -> list[str]:
        """Ids of the problems whose answer states no choice."""
        return [identity for identity, choice in self.choices.items() if choice is None]

    def data(self) -> dict[str, Any]:
        """Return the scores as a table for JSON."""
        total = self.columns["Avg"]
        return {
            "accuracy": self.accuracy,
            "correct": total.correct,
            "count": total.count,
            "columns": {
                name: {"percent": c.percent, "correct": c.correct, "count": c.count}
                for name, c in self.columns.items()
            },
            "unparsable": self.unparsable,
        }


def table(title: str, results: Mapping[str, Result]) -> Table:
    """Return a table with a row for each result, in percent, and a last row with the problems."""
    rows: list[list[str | float | int | None]] = [
        [
            name,
            *(None if c.percent is None else round(c.percent, 2) for c in result.columns.values()),
            result.columns["Avg"].correct,
            len(result.unparsable),
        ]
        for name, result in results.items()
    ]
    # all results are over the same problems, so that one row of counts serves the whole table
    counts = next(iter(results.values())).columns.values()
    rows.append(["problems", *(column.count for column in counts), None, None])
    columns = ["answers", *COLUMNS, "right", "without a choice"]
    return Table(title=title, columns=columns, rows=rows)
