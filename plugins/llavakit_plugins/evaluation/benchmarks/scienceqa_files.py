"""Scores files of answers to ScienceQA, of one model or of an ensemble of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from llavakit import Build, ChatModel, DataError, InputPath, Options, Use
from llavakit_plugins.datasets.rows import listed
from llavakit_plugins.datasets.scienceqa_problems import (
    Problem,
    read_choice,
    read_letter,
    read_problems,
)
from llavakit_plugins.evaluation.answers import Answers, read_answers
from llavakit_plugins.evaluation.benchmarks.ensembles import (
    Ensemble,
    complement,
    differing,
    judge_messages,
    judged,
    upper_bound,
)
from llavakit_plugins.evaluation.benchmarks.science_table import Result, table
from llavakit_plugins.evaluation.file_scores import FileScore, FileScorer
from llavakit_plugins.evaluation.judging import JudgeSettings, replies


class ScienceQAFilesOptions(Options):
    """Options of `score scienceqa`."""

    problems: InputPath = Field(description="ScienceQA's problems.json")
    predictions: InputPath = Field(
        description="answers: JSON Lines or a list of question_id and text, or outputs by id"
    )
    split: str = Field(default="test", description="which problems count (test)")
    second: InputPath | None = Field(default=None, description="another model's answers")
    ensemble: Ensemble | None = Field(
        default=None, description="how the two become one: the second's where it has one, or a "
        "judge's where they differ",
    )  # fmt: skip
    requery: InputPath | None = Field(
        default=None, description="the judge's answers, where they are there already"
    )
    judge: Use[ChatModel] | None = Field(
        default=None, description="a chat model to ask where the two differ"
    )
    ledger: Path | None = Field(
        default=None, description="keeps the judge's replies, so that none is paid for twice"
    )

    @model_validator(mode="after")
    def _ensembles_have_two(self) -> Self:
        if (self.second is None) != (self.ensemble is None):
            raise ValueError("an ensemble needs both `second` and `ensemble`; state the other one")
        if self.requery is not None and self.ensemble != "judge":
            raise ValueError("`requery` holds a judge's answers; state `ensemble` as `judge`")
        if (self.judge is None) != (self.ledger is None):
            raise ValueError("`judge` and `ledger` belong together; state both or none")
        if self.judge is not None and self.ensemble != "judge":
            raise ValueError("`judge` is asked for `ensemble` `judge` only; state that")
        return self


class ScienceQAFiles(FileScorer):
    """Scores answers to ScienceQA in the columns of table 7 of arXiv 2304.08485.

    Files are joined by id. A missing answer is wrong, and so is one that states no choice.
    """

    name = "scienceqa"
    Options = ScienceQAFilesOptions

    def __init__(self, options: ScienceQAFilesOptions, *, build: Build) -> None:
        self.options = options
        self.judge = None if options.judge is None else build(options.judge)

    def score(self) -> FileScore:
        problems = list(read_problems(self.options.problems, self.options.split).values())
        notes: list[str] = []
        answers, missing = self._read(self.options.predictions, problems, notes)
        ours = _choices(problems, answers)
        result = Result.of(problems, ours)
        shown = {"predictions": result}
        data: dict[str, Any] = {}
        if self.options.second is not None:
            final, data["ensemble"] = self._ensemble(problems, answers, shown, notes)
            shown[str(self.options.ensemble)] = result = Result.of_letters(problems, final)
        if answers.stored is not None:
            data["stored"] = _stored(problems, ours, answers.stored)
        # -1 stands for no choice in the original's result files, too
        results = {
            name: -1 if choice is None else choice for name, choice in result.choices.items()
        }
        data = {**result.data(), "missing": missing, **data, "results": results}
        title = f"ScienceQA, {len(problems)} problems of {self.options.problems}: right, %"
        return FileScore(data, [table(title, shown)], notes)

    def _read(
        self, path: Path, problems: Sequence[Problem], notes: list[str]
    ) -> tuple[Answers, list[str]]:
        answers = read_answers(path)
        known = {problem.id for problem in problems}
        strange = [name for name in answers.texts if name not in known]
        missing = [problem.id for problem in problems if problem.id not in answers.texts]
        # joined by id, a file of another data set would otherwise score 0 without an error
        if len(missing) == len(problems):
            raise DataError(
                f"{path} answers no problem of {self.options.problems} (it has "
                f"{listed(strange)}); do the two belong together?"
            )
        if missing:
            notes.append(f"{path} has no answer to {listed(missing)}: counted as wrong")
        if strange:
            notes.append(f"{path} answers {listed(strange)}, of no problem asked: left out")
        return answers, missing

    def _ensemble(
        self,
        problems: Sequence[Problem],
        answers: Answers,
        shown: dict[str, Result],
        notes: list[str],
    ) -> tuple[list[int | None], dict[str, Any]]:
        assert self.options.second is not None
        others, missing = self._read(self.options.second, problems, notes)
        # letters of the alphabet, as a letter beyond the choices also counts as different here
        ours = [read_letter(answers.texts.get(problem.id, "")) for problem in problems]
        second = [read_letter(others.texts.get(problem.id, "")) for problem in problems]
        indices = differing(ours, second)
        shown["second"] = Result.of_letters(problems, second)
        shown["upper bound"] = Result.of_letters(problems, upper_bound(problems, ours, second))
        data: dict[str, Any] = {
            "kind": self.options.ensemble,
            "ours": shown["predictions"].data(),
            "second": {**shown["second"].data(), "missing": missing},
            "upper_bound": shown["upper bound"].data(),
            "second_without_answer": second.count(None),
            "differ": len(indices),
        }
        if self.options.ensemble == "complement":
            return complement(ours, second), data
        chosen = [problems[index] for index in indices]
        texts = self._verdicts(chosen, answers, others, notes)
        verdicts = {p.id: read_letter(texts.get(p.id, "")) for p in chosen}
        silent = [name for name, verdict in verdicts.items() if verdict is None]
        data |= {"requeried": len(verdicts) - len(silent), "not_requeried": silent}
        if silent:
            notes.append(
                f"the two differ on {len(indices)} problems, and the judge has no choice for "
                f"{listed(silent)}: ours counts there"
                + ("" if texts else "; state a --judge, or its answers with --requery")
            )
        return judged(ours, second, {i: verdicts[problems[i].id] for i in indices}), data

    def _verdicts(
        self, problems: Sequence[Problem], ours: Answers, second: Answers, notes: list[str]
    ) -> Mapping[str, str]:
        """Return what the judge says on the problems on which the two differ."""
        texts: dict[str, str] = {}
        if self.options.requery is not None:
            texts |= read_answers(self.options.requery).texts
        # the judge is paid for what the file of its answers lacks, and for no more
        todo = [problem for problem in problems if problem.id not in texts]
        if self.judge is not None:
            prompts = [
                judge_messages(p, ours.texts.get(p.id, ""), second.texts.get(p.id, ""))
                for p in todo
            ]
            said = replies(
                self.judge, prompts, [p.id for p in todo], JudgeSettings(ledger=self.options.ledger)
            )
            pairs = zip(todo, said.texts, strict=True)
            texts |= {problem.id: text for problem, text in pairs if text is not None}
            if said.usd is not None:
                notes.append(f"the judge's replies cost {said.usd:.2f} USD")
        return texts


def _choices(problems: Sequence[Problem], answers: Answers) -> list[int | None]:
    return [read_choice(answers.texts.get(problem.id, ""), problem) for problem in problems]


def _stored(
    problems: Sequence[Problem], ours: Sequence[int | None], stored: Mapping[str, int]
) -> dict[str, Any]:
    """Return how the choices that the file stores compare with those that its texts state."""
    pairs = {p.id: (mine, stored.get(p.id)) for p, mine in zip(problems, ours, strict=True)}
    stated = {name: pair for name, pair in pairs.items() if pair[0] is not None}
    right = sum(stored.get(problem.id) == problem.answer for problem in problems)
    return {
        "accuracy": right / len(problems),
        "correct": right,
        "stated": len(stated),
        "agree": sum(mine == theirs for mine, theirs in stated.values()),
        "differ": [name for name, (mine, theirs) in stated.items() if mine != theirs],
    }
