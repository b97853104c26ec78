"""What a benchmark returns, checked where it comes in: a package's own may return anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llavakit import Benchmark, DataError, PluginError, Question, Score, and_more
from llavakit.contracts.sections import Curves, Gallery, Table


def questions_of(benchmark: Benchmark) -> list[Question]:
    """Return what a benchmark asks. Raises DataError for none and for ids that occur twice."""
    found: Any = benchmark.questions()
    if not isinstance(found, Sequence) or not all(isinstance(one, Question) for one in found):
        raise PluginError(
            f"benchmark `{benchmark.name}` returned {found!r:.80} from `questions`; return a list "
            "of Questions"
        )
    if not found:
        raise DataError(
            f"benchmark `{benchmark.name}` has no questions, so there is nothing to score; look at "
            "its options and files, or leave it out by `skip = true`"
        )
    times = Counter(str(question.id) for question in found)  # answers are joined by them
    if doubled := [name for name, count in times.items() if count > 1]:
        raise DataError(
            f"benchmark `{benchmark.name}` has several questions of one id: "
            f"{and_more(doubled, spell='`{:.80}`'.format)}; give each an id of its own"
        )
    return list(found)


def checked_score(benchmark: Benchmark, score: object, count: int) -> Score:
    """Return the score of `count` answers in plain numbers. Raises PluginError for another form."""
    who = f"benchmark `{benchmark.name}`"
    if not isinstance(score, Score):
        raise PluginError(f"{who} returned {score!r:.80} as its score; return a Score")
    lists: dict[str, Any] = {"right": score.right, "remarks": score.remarks}
    for name, found in lists.items():
        if isinstance(found, str) or not isinstance(found, Sequence | np.ndarray):
            raise PluginError(f"{who} has {found!r:.80} for `Score.{name}`; return a list")
        if len(found) != count and (len(found) or name == "right"):
            raise PluginError(
                f"{who} has {len(found)} entries in `Score.{name}` for {count} questions; return "
                "one a question"
            )
    right = [None if one is None else _plain(who, one) for one in score.right]
    if unread := [one for one in score.remarks if not isinstance(one, str)]:
        raise PluginError(f"{who} has {unread[0]!r:.80} in `Score.remarks`; return texts")
    if not isinstance(score.metrics, Mapping):
        raise PluginError(f"{who} has {score.metrics!r:.80} for `Score.metrics`; return a mapping")
    kinds = (Curves, Table, Gallery)
    if odd := [one for one in score.sections if not isinstance(one, kinds)]:
        raise PluginError(f"{who} has {odd[0]!r:.80} in `Score.sections`; return a Table, say")
    return replace(score, right=right)


def _plain(who: str, right: object) -> bool:
    if not isinstance(right, bool | np.bool_):
        raise PluginError(f"{who} has {right!r:.80} in `Score.right`; return True, False or None")
    return bool(right)  # numpy's is none of JSON's
