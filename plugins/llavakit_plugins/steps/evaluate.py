"""Evaluates the model on benchmarks, with its images and without their help."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, model_validator

import llavakit
from llavakit import (
    Benchmark,
    DataError,
    Dataset,
    LlavaError,
    ModelError,
    Outcome,
    Question,
    Run,
    Score,
    Step,
    Use,
    explain_write,
    interrupts,
    write_text,
)
from llavakit.contracts.component import SkippableUse
from llavakit.contracts.data import IMAGE
from llavakit.contracts.model import Sampling
from llavakit.contracts.run import Planner, ProcessGroup, StepPlan
from llavakit.contracts.sections import Card, Gallery, Section, Table
from llavakit_plugins.evaluation.answer_files import AnswerFile
from llavakit_plugins.evaluation.benchmarks.llava_bench import LlavaBench
from llavakit_plugins.evaluation.returned import checked_score, questions_of
from llavakit_plugins.reporting.pictures import save_thumbnail
from llavakit_plugins.training.starting import StartOptions, missing_model, sketch_start

if TYPE_CHECKING:
    from llavakit import LlavaModel

_SUFFIX = {"sighted": "", "blind": "-blind"}


@dataclass(frozen=True)
class Result:
    """A benchmark's answers and their score."""

    answers: Sequence[str]
    score: Score


class BenchmarkUse(SkippableUse[Benchmark]):
    """A benchmark of a recipe: `{ use = "llava-bench", label = "coco", ... }`."""

    label: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name of its files and metrics; by default the benchmark's name."""


class EvaluateOptions(StartOptions):
    benchmarks: tuple[BenchmarkUse, ...] = ()
    losses: tuple[Use[Dataset], ...] = ()
    """Held-out data whose loss is measured, one by one."""
    blind: bool = False
    """Also ask with the images of other questions: what is then still right needs no image."""
    batch_size: int = Field(default=64, ge=1)
    workers: int = Field(default=2, ge=0)
    """Threads that read and prepare the images of the next batches."""
    processes: int = Field(default=1, ge=1)
    """On a CPU, without torchrun: so many processes share the batches, each with one thread."""
    max_new_tokens: int = Field(default=64, ge=1, le=10**9)
    max_length: int = Field(default=2048, ge=2)
    examples: int = Field(default=24, ge=0)
    """Answers to show in the report."""
    model_id: str | None = None
    """What answer files call the model; its folder where absent."""

    @model_validator(mode="after")
    def _measure_something(self) -> Self:
        if not self.losses and all(use.skip for use in self.benchmarks):
            raise ValueError(
                "step `evaluate` measures nothing: name a benchmark that is not skipped, or data "
                "in `losses`; `skip = true` leaves out the whole step"
            )
        return self


class Evaluate(Step):
    """Asks every benchmark's questions, and measures the loss of held-out data.

    Where torchrun started several processes, each answers its share; the main one scores.
    """

    name = "evaluate"
    Options = EvaluateOptions
    needs_model = True
    together = True

    def __init__(self, options: EvaluateOptions) -> None:
        self.options = options

    def run(self, run: Run) -> Outcome:
        model = self._model(run)
        metrics: dict[str, float] = {}
        sections: list[Section] = []
        uses = [use for use in self.options.benchmarks if not use.skip]
        names = _distinct([use.label or use.use for use in uses])
        for name, use in zip(names, uses, strict=True):
            benchmark = run.build(use)
            questions = questions_of(benchmark)
            variants = {"sighted": questions}
            if self.options.blind:
                variants["blind"] = shuffle_images(questions, run.seed)
            results = {}
            for way, own in variants.items():
                file, answers = self._ask(run, model, own, f"{name}{_SUFFIX[way]}")
                # scoring may pay a judge and writes files, so that only one process may do it
                if run.process_group.is_main:
                    results[way] = self._score(run, benchmark, own, answers, file)
            if not results:
                continue
            prefix = f"{name}_" if len(uses) > 1 else ""
            for way, result in results.items():
                metrics |= {f"{prefix}{way}_{k}": v for k, v in result.score.metrics.items()}
            sections += _tables(name, questions, {w: r.score for w, r in results.items()})
            sections.append(self._gallery(run, name, questions, results["sighted"]))
        if self.options.losses and run.process_group.is_main:
            sections.append(self._losses(run, model, metrics))
        return Outcome(metrics, sections)

    @classmethod
    def missing(cls, options: EvaluateOptions) -> str | None:
        return missing_model(options)

    @classmethod
    def leaves(cls, options: EvaluateOptions) -> Mapping[str, bool]:
        return {}

    @classmethod
    def plan(cls, options: EvaluateOptions, planner: Planner) -> StepPlan | None:
        sketch_start(planner, options)
        if options.losses or options.changes:  # which not every layout allows
            _ = planner.has_model  # for its errors
        return _price(options, planner)

    def _model(self, run: Run) -> Any:
        options = self.options
        if options.init is None or options.changes:
            # only our own model can be changed;
            # any other layout (ONNX, for one) is loaded as it is, below
            from llavakit_plugins.training.initial import start

            return start(run, options).eval()
        model = llavakit.load(options.init, device=run.device, **options.given)
        if self.options.losses and not isinstance(model, llavakit.LlavaModel):
            raise ModelError(
                f"{self.options.init} answers questions, but its layout tells no losses; leave "
                "`losses` out"
            )
        return model

    def _ask(
        self, run: Run, model: Any, questions: Sequence[Question], name: str
    ) -> tuple[AnswerFile, list[str]]:
        """Return the file of a benchmark's answers, and in the main process the answers of all."""
        from llavakit_plugins.evaluation.answering import Pace, ask

        options, group = self.options, run.process_group
        model_id = options.model_id or str(options.init or run.directory.parent.name)
        path = run.directory / f"{name}.jsonl"
        file = AnswerFile(path, model_id, resume=run.resume, process_group=group)
        return file, ask(
            model,
            questions,
            file,
            Sampling(options.max_new_tokens),
            Pace(options.batch_size, options.workers, options.processes),
            progress=run.progress,
            stopping=run.stopping,
            note=name,
        )

    def _score(
        self,
        run: Run,
        benchmark: Benchmark,
        questions: Sequence[Question],
        answers: Sequence[str],
        file: AnswerFile,
    ) -> Result:
        folder = run.directory / f"{file.path.stem}-scoring"
        with explain_write(folder):
            folder.mkdir(exist_ok=True)
        with ExitStack() as stack:
            alone = replace(run, directory=folder, process_group=ProcessGroup())
            if run.process_group.size > 1:  # `run.stopping` asks all, and the others are done
                stopping = stack.enter_context(interrupts(alone.process_group))
                alone = replace(alone, stopping=stopping)
            # in a folder of its own: a benchmark may keep
            # reviews or replies there, for a resumed run
            scored = benchmark.score_in(alone, questions, answers)
            score = checked_score(benchmark, scored, len(questions))
        if not any(folder.iterdir()):
            folder.rmdir()
        # the file is written again, whole, now that each row can say whether its answer is right
        rows = [
            file.row(question, answer, right=right)
            for question, answer, right in zip(questions, answers, score.right, strict=True)
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(file.path, "".join(f"{line}\n" for line in lines))
        return Result(answers, score)

    def _gallery(
        self, run: Run, name: str, questions: Sequence[Question], result: Result
    ) -> Gallery:
        draw = np.random.default_rng(run.seed)
        # one seed for all runs of a recipe:
        # their reports show the same questions and can be compared
        count = min(self.options.examples, len(questions))
        cards: list[Card] = []
        for index in draw.choice(len(questions), count, replace=False).tolist():
            question, answer = questions[index], result.answers[index]
            right = result.score.right[index]
            shown = None
            if question.images:
                folder = run.directory / "images"
                shown = save_thumbnail(question.images[0], folder, f"{name}-{len(cards):03}")
            prompt = question.prompt.replace(IMAGE, "").strip()
            lines = [("question", prompt), ("answer", answer)]
            if question.truth and question.truth != answer:
                lines.append(("reference" if right is None else "truth", question.truth))
            if result.score.remarks:
                lines.append(("review" if right is None else "remark", result.score.remarks[index]))
            cards.append(Card(image=shown, lines=lines, right=right))
        return Gallery(title=f"{name}: questions and answers", cards=cards)

    def _losses(self, run: Run, model: LlavaModel, metrics: dict[str, float]) -> Table:
        from llavakit_plugins.evaluation.losses import held_out_losses
        from llavakit_plugins.training.corpus import Corpus
        from llavakit_plugins.training.forked import shares_for

        options = self.options
        data_sets = [run.build(use) for use in options.losses]
        uses = zip(options.losses, data_sets, strict=True)
        names = _distinct([data[0].kind or use.use for use, data in uses])
        corpora = [Corpus(data, model, model.template, options.max_length) for data in data_sets]
        shares = shares_for(model, run.process_group, options.processes)
        losses = held_out_losses(model, corpora, shares)
        metrics |= {f"loss_{name}": loss for name, loss in zip(names, losses, strict=True)}
        rows: list[list[str | float | int | None]] = [
            [name, len(data), round(loss, 4), round(float(np.exp(loss)), 3)]
            for name, data, loss in zip(names, data_sets, losses, strict=True)
        ]
        return Table(
            title="Held-out loss by sort of response",
            columns=["response", "samples", "loss a token", "perplexity"],
            rows=rows,
        )


def _price(options: EvaluateOptions, planner: Planner) -> StepPlan | None:
    """Return what judges will cost, as far as their files are there."""
    plans: list[StepPlan] = []
    for use in options.benchmarks:
        if not use.skip and "judge" in use.options:
            with suppress(LlavaError):  # the run says what is missing
                benchmark = planner.build(use)
                if isinstance(benchmark, LlavaBench):
                    plans += [benchmark.price()] * (1 + options.blind)
    if not plans:
        return None
    usd = [plan.cost_usd for plan in plans if plan.cost_usd is not None]
    # a sum without the judges of unknown price would look like the whole cost
    whole = sum(usd) if len(usd) == len(plans) else None
    return StepPlan(cost_usd=whole, note="; ".join(plan.note for plan in plans))


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names; a name that was there before gets a number."""
    return [
        name if (before := names[:index].count(name)) == 0 else f"{name}-{before + 1}"
        for index, name in enumerate(names)
    ]


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Return the questions, each with the images of another question.

    No question keeps its own images; questions without an image stay as they are. Raises DataError
    if all have the same images.
    """
    # whole sets of images are exchanged, because several questions may be about the same image: a
    # shuffle of questions could give one of them its own image back
    distinct = sorted({question.images for question in questions} - {()}, key=str)
    if len(distinct) == 1:
        raise DataError(
            "all questions are about the same image, so `blind` has no other to show; leave it out"
        )
    # one cycle through all sets, so that none keeps its place
    order = np.random.default_rng([seed, 1]).permutation(len(distinct)).tolist()
    following = {
        distinct[here]: distinct[there]
        for here, there in zip(order, [*order[1:], *order[:1]], strict=True)
    }
    return [replace(q, images=following.get(q.images, ())) for q in questions]


def _tables(
    name: str, questions: Sequence[Question], scores: Mapping[str, Score]
) -> Iterator[Section]:
    """Yield a benchmark's own tables; one of right answers where it has none."""
    if not scores["sighted"].sections:
        yield _table(name, questions, scores)
    for way, score in scores.items():
        for section in score.sections:
            title = f"{name}: {section.title}{', blind' if way == 'blind' else ''}"
            yield section.model_copy(update={"title": title})


def _table(name: str, questions: Sequence[Question], scores: Mapping[str, Score]) -> Table:
    """Return how many are right, by the question's wording where that recurs."""
    forms = Counter(question.prompt for question in questions)
    # 20, to keep the table short where every question is worded differently
    common = [form for form, count in forms.most_common(20) if count > 1]
    rows: list[list[str | float | int | None]] = []
    for form in [*sorted(common), None]:
        chosen = [i for i, q in enumerate(questions) if form is None or q.prompt == form]
        row: list[str | float | int | None] = [form or "all questions", len(chosen)]
        for score in scores.values():
            right = sum(bool(score.right[index]) for index in chosen)
            row.append(round(100 * right / max(1, len(chosen)), 1))
        rows.append(row)
    return Table(
        title=f"{name}: share of right answers",
        columns=["question", "asked", *(f"{kind}, %" for kind in scores)],
        rows=rows,
        caption="Blind: the same question with the image of another." if "blind" in scores else "",
    )
