"""What a package's own benchmark returns is checked before it is joined, counted or written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runs import run_in

from llavakit import Benchmark, DataError, PluginError, Question, Score
from llavakit_plugins.steps.evaluate import BenchmarkUse, Evaluate, EvaluateOptions

ASKED = [Question("a", "what colour is it ?"), Question("b", "what shape ?")]


class Own(Benchmark):
    """Returns what it was given."""

    name = "own"

    def __init__(self, asked: Any = ASKED, scored: Any = None) -> None:
        super().__init__()
        self.asked, self.scored = asked, scored

    def questions(self) -> Any:
        return self.asked

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Any:
        return self.scored


def evaluate(model: Path, folder: Path, benchmark: Benchmark) -> dict[str, float]:
    options = EvaluateOptions(
        init=model, benchmarks=(BenchmarkUse(use="own"),), max_new_tokens=1, workers=0
    )
    run = run_in(folder, build=lambda *_, **__: benchmark)
    return dict(Evaluate(options).run(run).metrics)


@pytest.mark.parametrize(
    ("benchmark", "sentence"),
    [
        (Own([]), "benchmark `own` has no questions"),
        (Own([*ASKED, Question("a", "and this ?")]), "several questions of one id: `a`; give each"),
        (Own([Question(1, "x"), Question("1", "y")]), "several questions of one id: `1`"),
        (Own(None), "`own` returned None from `questions`"),
        (Own([{"id": "a"}]), "from `questions`; return a list of Questions"),
        (Own(scored={"accuracy": 1}), "as its score; return a Score"),
        (Own(scored=Score({}, [True])), "has 1 entries in `Score.right` for 2 questions"),
        (Own(scored=Score({}, [])), "has 0 entries in `Score.right` for 2 questions"),
        (Own(scored=Score({}, ["yes", "no"])), "has 'yes' in `Score.right`; return True, False"),  # type: ignore[list-item]
        (Own(scored=Score({}, None)), "has None for `Score.right`; return a list"),  # type: ignore[arg-type]
        (Own(scored=Score({}, [None] * 2, remarks=["good"])), "has 1 entries in `Score.remarks`"),
        (Own(scored=Score({}, [None] * 2, remarks=[1, 2])), "has 1 in `Score.remarks`"),  # type: ignore[list-item]
        (Own(scored=Score([], [None] * 2)), r"has \[\] for `Score.metrics`"),  # type: ignore[arg-type]
        (Own(scored=Score({}, [None] * 2, [{}])), r"has \{\} in `Score.sections`"),  # type: ignore[list-item]
    ],
)  # fmt: skip
def test_what_a_benchmark_cannot_return_is_said(
    benchmark: Benchmark, sentence: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises((DataError, PluginError), match=sentence):
        evaluate(model, tmp_path / "run", benchmark)


def test_numpy_s_truth_values_are_written_as_json_s(model: Path, tmp_path: Path) -> None:
    right = np.array([True, False])
    benchmark = Own(scored=Score({"accuracy": 0.5}, right))  # type: ignore[arg-type]
    assert evaluate(model, tmp_path / "run", benchmark) == {"sighted_accuracy": 0.5}
    lines = (tmp_path / "run" / "own.jsonl").read_text().splitlines()
    assert [json.loads(line)["right"] for line in lines] == [True, False]
