"""Evaluates the model on benchmarks, with its images and without their help."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field

from llavakit import (
    Benchmark,
    DataError,
    Dataset,
    InputPath,
    LlavaModel,
    Options,
    Outcome,
    Question,
    Run,
    Score,
    Step,
    Stopped,
    Use,
)
from llavakit.files import write_text
from llavakit.generation import Sampling
from llavakit.images import save_thumbnail
from llavakit.reporting import Card, Gallery, Section, Table
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.features import Encoding
from llavakit_plugins.training.loop import held_out_loss


class EvaluateOptions(Options):
    benchmarks: tuple[Use[Benchmark], ...] = ()
    losses: tuple[Use[Dataset], ...] = ()
    """Held-out data whose loss is measured, one by one."""
    init: InputPath | None = None
    """A model folder; the newest of the earlier steps where absent."""
    blind: bool = False
    """Also ask with the images of other questions: what is still right needs no image."""
    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    max_length: int = Field(default=2048, ge=2)
    examples: int = Field(default=24, ge=0)
    """Answers to show in the report."""


class Evaluate(Step):
    """Asks every benchmark's questions, and measures the loss of held-out data."""

    name = "evaluate"
    Options = EvaluateOptions
    needs_model = True

    def __init__(self, options: EvaluateOptions) -> None:
        self.options = options

    def run(self, run: Run) -> Outcome:
        model = run.model(self.options.init).eval()
        metrics: dict[str, float] = {}
        sections: list[Section] = []
        names = _distinct([use.use for use in self.options.benchmarks])
        for name, use in zip(names, self.options.benchmarks, strict=True):
            benchmark = run.build(use)
            questions = benchmark.questions()
            answers = self._ask(run, model, questions, name)
            score = benchmark.score(questions, answers)
            scores = {"sighted": score}
            self._keep(run.directory, name, questions, answers, score)
            if self.options.blind:
                blind = shuffle_images(questions, run.seed)
                guesses = self._ask(run, model, blind, f"{name}, blind")
                scores["blind"] = benchmark.score(questions, guesses)
                self._keep(run.directory, f"{name}-blind", blind, guesses, scores["blind"])
            prefix = f"{name}_" if len(self.options.benchmarks) > 1 else ""
            for way, result in scores.items():
                metrics |= {f"{prefix}{way}_{key}": v for key, v in result.metrics.items()}
            sections.append(_table(name, questions, scores))
            sections.append(self._gallery(run, name, questions, answers, score))
        if self.options.losses:
            sections.append(self._losses(run, model, metrics))
        return Outcome(metrics, sections)

    def _ask(
        self, run: Run, model: LlavaModel, questions: Sequence[Question], note: str
    ) -> list[str]:
        """Return the greedy answers, decoded in batches of questions of like length."""
        order = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
        answers = [""] * len(questions)
        sampling = Sampling(self.options.max_new_tokens)
        for begin in range(0, len(order), self.options.batch_size):
            chosen = order[begin : begin + self.options.batch_size]
            prompts = [(questions[index].prompt, questions[index].images) for index in chosen]
            for index, answer in zip(chosen, model.answer(prompts, sampling), strict=True):
                answers[index] = answer
            run.progress(min(begin + len(chosen), len(order)), len(order), note)
            if run.stopping():
                raise Stopped
        return answers

    def _keep(
        self,
        folder: Path,
        name: str,
        questions: Sequence[Question],
        answers: Sequence[str],
        score: Score,
    ) -> None:
        lines = (
            json.dumps(
                {
                    "question_id": question.id,
                    "prompt": question.prompt,
                    "image": [str(image) for image in question.images],
                    "text": answer,
                    "truth": question.truth,
                    "right": right,
                },
                ensure_ascii=False,
            )
            for question, answer, right in zip(questions, answers, score.right, strict=True)
        )
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")

    def _gallery(
        self,
        run: Run,
        name: str,
        questions: Sequence[Question],
        answers: Sequence[str],
        score: Score,
    ) -> Gallery:
        draw = np.random.default_rng(run.seed)
        count = min(self.options.examples, len(questions))
        cards: list[Card] = []
        for index in draw.choice(len(questions), count, replace=False).tolist():
            question = questions[index]
            shown = None
            if question.images:
                place = run.directory / "images"
                shown = save_thumbnail(question.images[0], place, f"{name}-{len(cards):03}")
            lines = [("question", question.prompt), ("answer", answers[index])]
            if question.truth and question.truth != answers[index]:
                lines.append(("truth", question.truth))
            cards.append(Card(image=shown, lines=lines, right=score.right[index]))
        return Gallery(title=f"{name}: questions and answers", cards=cards)

    def _losses(self, run: Run, model: LlavaModel, metrics: dict[str, float]) -> Table:
        rows: list[list[str | float | int | None]] = []
        dtype = next(model.vision.parameters()).dtype
        data_sets = [run.build(use) for use in self.options.losses]
        uses = zip(self.options.losses, data_sets, strict=True)
        names = _distinct([data[0].kind or use.use for use, data in uses])
        for name, data in zip(names, data_sets, strict=True):
            corpus = Corpus(data, model, model.template, self.options.max_length)
            features = Encoding(corpus, model, workers=0, dtype=dtype, learns=False)
            loss = held_out_loss(model, corpus, 8192, features)
            metrics[f"loss_{name}"] = loss
            rows.append([name, len(data), round(loss, 4), round(float(np.exp(loss)), 3)])
        return Table(
            title="Held-out loss by sort of response",
            columns=["response", "samples", "loss a token", "perplexity"],
            rows=rows,
        )


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, those that recur with a number behind."""
    return [
        name if (before := names[:place].count(name)) == 0 else f"{name}-{before + 1}"
        for place, name in enumerate(names)
    ]


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Return the questions, each with the images of another: no image stays in its place.

    Questions without an image stay as they are. Raises DataError where all have the same images.
    """
    distinct = sorted({question.images for question in questions} - {()}, key=str)
    if len(distinct) == 1:
        raise DataError(
            "all questions are about the same image, so `blind` has no other to show; leave it out"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(distinct)).tolist()
    following = {
        distinct[here]: distinct[there]
        for here, there in zip(order, [*order[1:], *order[:1]], strict=True)
    }
    return [replace(q, images=following.get(q.images, ())) for q in questions]


def _table(name: str, questions: Sequence[Question], scores: dict[str, Score]) -> Table:
    """Return how many are right, by the question's wording where that recurs."""
    forms = Counter(question.prompt for question in questions)
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
