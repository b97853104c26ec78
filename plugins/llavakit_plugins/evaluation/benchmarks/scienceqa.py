"""ScienceQA: multiple choice with and without images (arXiv 2304.08485, section 5.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from llavakit import Benchmark, Build, ChatModel, InputPath, Options, Question, Run, Score, Use
from llavakit.contracts.data import IMAGE
from llavakit_plugins.datasets.scienceqa_problems import (
    LETTERS,
    Format,
    Problem,
    question_text,
    read_choice,
    read_letter,
    read_problems,
)
from llavakit_plugins.evaluation.answers import read_answers
from llavakit_plugins.evaluation.benchmarks.ensembles import (
    Ensemble,
    complement,
    differing,
    judge_messages,
    judged,
    upper_bound,
)
from llavakit_plugins.evaluation.benchmarks.science_table import Result, table
from llavakit_plugins.evaluation.benchmarks.scienceqa_files import ScienceQAFiles
from llavakit_plugins.evaluation.judging import JudgeSettings, Replies, replies

_LETTER_ONLY = "Answer with the letter of the right option only."
_BEHIND_REASONS = "###\nANSWER:"


class ScienceQAOptions(Options):
    """Options of `scienceqa`."""

    problems: InputPath
    """ScienceQA's `problems.json`."""
    images: InputPath | None = None
    """The folder with `SPLIT/ID/image.png` or `ID/image.png`; by default that of the problems."""
    split: str = "test"
    format: Format = "QCM-LEA"
    """The format that the model was trained with; only its question part is used here."""
    suffix: str | None = None
    """A last line for every question. By default, formats that expect the answer alone ask for the
    letter."""
    with_images: bool = True
    """Whether problems with an image show it; otherwise all problems are text only."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many problems from the start."""
    second: InputPath | None = None
    """Another model's answers, for an ensemble."""
    ensemble: Ensemble | None = None
    judge: Use[ChatModel] | None = None
    """The chat model that decides if the two differ."""
    concurrency: int = Field(default=8, ge=1)
    """Requests to the judge that are in flight at once."""

    @model_validator(mode="after")
    def _ensembles_are_whole(self) -> Self:
        if (self.second is None) != (self.ensemble is None):
            raise ValueError("an ensemble needs both `second` and `ensemble`; state the other one")
        if (self.judge is None) != (self.ensemble != "judge"):
            raise ValueError('`ensemble = "judge"` and `judge` belong together; state both or none')
        return self


class ScienceQA(Benchmark):
    """ScienceQA, scored as published: a model alone, or in an ensemble with another's answers.

    The columns are those of table 7 of arXiv 2304.08485.
    """

    name = "scienceqa"
    Options = ScienceQAOptions
    scorers = (ScienceQAFiles,)

    def __init__(self, options: ScienceQAOptions, *, build: Build) -> None:
        self.options = options
        found = list(read_problems(options.problems, options.split).values())
        self.problems = found[: options.limit]
        self.second = None if options.second is None else read_answers(options.second).texts
        self.judge = None if options.judge is None else build(options.judge)

    def questions(self) -> Sequence[Question]:
        return [self._question(problem) for problem in self.problems]

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        return self._score(questions, answers, JudgeSettings(self.options.concurrency))

    def score_in(self, run: Run, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        return self._score(questions, answers, JudgeSettings.within(run, self.options.concurrency))

    def _question(self, problem: Problem) -> Question:
        text = question_text(problem, self.options.format).replace(IMAGE, "").strip()
        alone = self.options.format.endswith("-A")
        suffix = self.options.suffix
        suffix = (_LETTER_ONLY if alone else "") if suffix is None else suffix
        prompt = f"{text}\n{suffix}".strip()
        images: tuple[Path, ...] = ()
        if problem.image and self.options.with_images:
            folder = self.options.images or self.options.problems.parent
            where = f"problem `{problem.id}` of {self.options.problems}"
            images = (problem.image_path(folder, where),)
            # behind the question, as in the original's converted files;
            # the prompt template may move it
            prompt = f"{prompt}\n{IMAGE}"
        truth = f"{problem.letter}. {problem.choices[problem.answer]}"
        then = _BEHIND_REASONS if self.options.format.endswith("-LEPA") else ""
        return Question(problem.id, prompt, images, truth, next(problem.columns), then)

    def _score(
        self, questions: Sequence[Question], answers: Sequence[str], settings: JudgeSettings
    ) -> Score:
        known = {problem.id: problem for problem in self.problems}
        problems = [known[str(question.id)] for question in questions]
        ours = [read_choice(text, p) for p, text in zip(problems, answers, strict=True)]
        result = Result.of(problems, ours)
        shown = {"model": result}
        metrics = {"accuracy": result.accuracy, "without_choice": float(len(result.unparsable))}
        metrics |= {
            f"accuracy_{name}": count.correct / count.count
            for name, count in result.columns.items()
            if count.count and name != "Avg"
        }
        if self.second is not None:
            # letters, not choices: the original's ensemble also keeps letters beyond the choices
            first = [read_letter(text) for text in answers]
            second = [read_letter(self.second.get(p.id, "")) for p in problems]
            if self.judge is None:
                final = complement(first, second)
            else:
                verdicts, said = self._verdicts(problems, answers, first, second, settings)
                final = judged(first, second, verdicts)
                metrics |= said.metrics()
            best = upper_bound(problems, first, second)
            for name, indices in (
                ("second", second),
                (str(self.options.ensemble), final),
                ("upper bound", best),
            ):
                shown[name] = Result.of_letters(problems, indices)
            metrics |= {
                f"accuracy_{name.replace(' ', '_')}": shown[name].accuracy
                for name in list(shown)[1:]
            }
        right = [mine == problem.answer for mine, problem in zip(ours, problems, strict=True)]
        remarks = [
            "states no choice" if choice is None else f"read as {LETTERS[choice]}"
            for choice in ours
        ]
        title = f"ScienceQA ({self.options.format}): right answers, %"
        return Score(metrics, right, [table(title, shown)], remarks)

    def _verdicts(
        self,
        problems: Sequence[Problem],
        answers: Sequence[str],
        ours: Sequence[int | None],
        second: Sequence[int | None],
        settings: JudgeSettings,
    ) -> tuple[Mapping[int, int | None], Replies]:
        """Ask the judge about the problems on which the two differ; return its answers by index."""
        assert self.judge is not None
        assert self.second is not None
        indices = differing(ours, second)
        prompts = [
            judge_messages(problems[i], answers[i], self.second.get(problems[i].id, ""))
            for i in indices
        ]
        said = replies(self.judge, prompts, [problems[i].id for i in indices], settings)
        choices = {
            i: None if text is None else read_letter(text)
            for i, text in zip(indices, said.texts, strict=True)
        }
        return choices, said
