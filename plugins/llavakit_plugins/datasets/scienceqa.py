"""ScienceQA as training data: one turn each, reasoning and then the answer (arXiv 2304.08485,
section 5.2)."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from llavakit import DataError, Dataset, InputPath, Options, Sample, Turn
from llavakit_plugins.datasets.expected import CHARACTERS_A_TOKEN, Expected
from llavakit_plugins.datasets.image_files import check_image
from llavakit_plugins.datasets.scienceqa_problems import (
    Format,
    Problem,
    answer_text,
    question_text,
    read_problems,
)


class ScienceQAOptions(Options):
    problems: InputPath
    """ScienceQA's `problems.json`."""
    images: InputPath | None = None
    """The folder with `SPLIT/ID/image.png` or `ID/image.png`; by default that of the problems."""
    split: str = "train"
    format: Format = "QCM-LEPA"
    """What is asked and what is supervised; see docs/evaluate.md."""
    limit: int | None = Field(default=None, ge=1)
    """Use only so many problems from the start."""
    expect: Expected | None = None


class ScienceQA(Dataset):
    """ScienceQA's problems as LLaVA's converter writes them, the image behind the question.

    Raises DataError where a problem or its image cannot be used.
    """

    name = "scienceqa"
    Options = ScienceQAOptions

    def __init__(self, options: ScienceQAOptions) -> None:
        self.options = options
        found = read_problems(options.problems, options.split).values()
        self.samples = [self._sample(problem) for problem in list(found)[: options.limit]]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @classmethod
    def expect(cls, options: ScienceQAOptions) -> tuple[int, int] | None:
        if not options.problems.is_file():
            return options.expect.upto(options.limit) if options.expect else None
        problems = list(read_problems(options.problems, options.split).values())[: options.limit]
        form = options.format
        text = sum(len(question_text(p, form)) + len(answer_text(p, form)) for p in problems)
        return len(problems), round(text / CHARACTERS_A_TOKEN / len(problems))

    def _sample(self, problem: Problem) -> Sample:
        where = f"problem `{problem.id}` of {self.options.problems}"
        images: tuple[Path, ...] = ()
        if problem.image:
            folder = self.options.images or self.options.problems.parent
            path = problem.image_path(folder, where)
            if not path.is_file():
                raise DataError(f"image {path} of {where} is missing; check the images folder")
            check_image(path, where)
            images = (path,)
        form = self.options.format
        turns = (
            Turn("human", question_text(problem, form)),
            Turn("gpt", answer_text(problem, form)),
        )
        sample = Sample(problem.id, turns, images, "scienceqa")
        sample.check(str(self.options.problems))
        return sample
