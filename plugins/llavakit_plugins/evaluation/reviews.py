"""Scores in a judge's reviews of two answers, and their statistics (arXiv 2304.08485, 5.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

_NUMBER = r"(\d+\.?\d*|\.\d+)"  # also `8.`, which the original's `float` reads
_BETWEEN = r"(?:\s*,\s*|\s+)"
_SCORES = re.compile(rf"\s*{_NUMBER}{_BETWEEN}{_NUMBER}\s*", re.ASCII)
_OF_TEN = re.compile(rf"\s*{_NUMBER}\s*/\s*10{_BETWEEN}{_NUMBER}\s*/\s*10\s*", re.ASCII)
_EMPHASIS = re.compile(r"(?<!\w)([*_`]{1,3})(?=\S)([^*_`\n]+?)(?<=\S)\1(?!\w)")
HIGHEST = 10.0
"""The best score that a judge gives."""
_RESAMPLES = 1000  # of the bootstrap

Pair = tuple[float, float]
"""Scores of the reference and of the candidate."""
Scores = Mapping[str, Pair | None]
"""Scores by question; None if a review has no scores."""
Reading = Literal["first-line", "tolerant"]
"""How a review's scores are found; see `read_scores`."""
RELATIVE_COLUMNS = ["category", "questions", "relative, %", "from", "to", "reference", "candidate"]


def read_scores(text: str, reading: Reading = "first-line") -> Pair | None:
    """Return the two scores on a review's first line, or None if it holds anything else.

    The line must be two numbers from 0 to 10 with a space or a comma between them. The `tolerant`
    reading also accepts what is clearly meant: it skips empty lines, ignores Markdown's emphasis,
    and reads `8/10 9/10`.
    """
    line = text.partition("\n")[0]
    found = _SCORES.fullmatch(line)
    if found is None and reading == "tolerant":
        line = next((line for line in text.splitlines() if line.strip()), "")
        line = _EMPHASIS.sub(r"\2", line)
        found = _SCORES.fullmatch(line) or _OF_TEN.fullmatch(line)
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    # a score above 10 shows that the judge used another scale; it cannot be compared
    return (first, second) if max(first, second) <= HIGHEST else None


@dataclass(frozen=True)
class Relative:
    """The statistics of the scores of some questions."""

    questions: int
    reference: float
    """Mean score of the reference, 0 to 10."""
    candidate: float
    relative: float
    """The candidate's mean in percent of the reference's mean. A ratio of means, as published, and
    not a mean of ratios."""
    low: float
    """Lower end of the 95 % bootstrap interval of `relative`, over questions."""
    high: float
    """Upper end of it."""

    @classmethod
    def of(cls, pairs: Sequence[Pair], seed: int = 0) -> Relative | None:
        """Return the statistics; None without pairs, and if the reference's scores are all 0."""
        scores_Q2 = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
        reference, candidate = _means(scores_Q2)
        if not len(scores_Q2) or reference == 0:
            return None
        draw = np.random.default_rng(seed)
        # questions are resampled with replacement, both scores of a question together
        chosen_RQ = draw.integers(0, len(scores_Q2), (_RESAMPLES, len(scores_Q2)))
        means_R2 = scores_Q2[chosen_RQ].mean(axis=1)
        # a resample whose reference scores are all 0 has no ratio
        kept_R2 = means_R2[means_R2[:, 0] > 0]
        low, high = np.percentile(100 * kept_R2[:, 1] / kept_R2[:, 0], (2.5, 97.5))
        relative = 100 * candidate / reference
        return cls(len(scores_Q2), reference, candidate, relative, float(low), float(high))


def _means(scores_Q2: npt.NDArray[np.float64]) -> Pair:
    if not len(scores_Q2):
        return 0.0, 0.0
    reference, candidate = scores_Q2.mean(axis=0).tolist()
    return reference, candidate


def by_category(
    pairs: Mapping[str, Pair], categories: Mapping[str, str], seed: int = 0
) -> dict[str, Relative]:
    """Return the result of each category, and of `all`: over all questions, so that categories
    count by their size."""
    names = dict.fromkeys(category for name in pairs if (category := categories.get(name)))
    groups = {c: [pair for name, pair in pairs.items() if categories.get(name) == c] for c in names}
    found = {name: Relative.of(group, seed) for name, group in groups.items()}
    found["all"] = Relative.of(list(pairs.values()), seed)
    return {name: result for name, result in found.items() if result is not None}


def unswapped(pair: Pair | None, row: Mapping[str, Any]) -> Pair | None:
    """Return (reference, candidate) scores of a review that may have shown the candidate first."""
    return pair[::-1] if pair and row.get("swapped") is True else pair


def mean_pair(pairs: Iterable[Pair | None]) -> Pair | None:
    """Return the mean scores of a question's reviews; None if one of them has no scores.

    The judge prefers one position, so half of two orders would not be comparable with a mean.
    """
    found = list(pairs)
    whole = [pair for pair in found if pair is not None]
    return _means(np.asarray(whole)) if whole and len(whole) == len(found) else None


def relative_rows(results: Mapping[str, Relative]) -> list[list[str | float | int | None]]:
    """Return the rows of a table with `RELATIVE_COLUMNS`."""
    return [
        [
            category,
            r.questions,
            *(round(value, 1) for value in (r.relative, r.low, r.high)),
            *(round(value, 2) for value in (r.reference, r.candidate)),
        ]
        for category, r in results.items()
    ]


def summarise(
    scores: Scores, categories: Mapping[str, str], seed: int = 0
) -> tuple[dict[str, Relative], list[str]]:
    """Return the results by category and `all`, and the questions without scores.

    These questions are left out of the results.
    """
    pairs = {name: pair for name, pair in scores.items() if pair is not None}
    unparsed = [name for name, pair in scores.items() if pair is None]
    return by_category(pairs, categories, seed), unparsed
