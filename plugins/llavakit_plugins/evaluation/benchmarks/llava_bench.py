"""LLaVA-Bench: a judge rates answers beside a reference's (arXiv 2304.08485, section 5.1)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from llavakit import (
    Benchmark,
    Build,
    ChatModel,
    DataError,
    InputPath,
    Message,
    Options,
    Question,
    Run,
    Score,
    Use,
    write_text,
)
from llavakit.contracts.data import ImageSource
from llavakit.contracts.run import StepPlan
from llavakit.contracts.sections import Table
from llavakit_plugins.datasets.rows import Row, listed, read_rows, text_of
from llavakit_plugins.evaluation.answers import read_answers
from llavakit_plugins.evaluation.benchmarks.review_files import ReviewFiles
from llavakit_plugins.evaluation.judging import JudgeSettings, Replies, replies
from llavakit_plugins.evaluation.questions import read_questions
from llavakit_plugins.evaluation.reviews import (
    RELATIVE_COLUMNS,
    Pair,
    Reading,
    mean_pair,
    read_scores,
    relative_rows,
    summarise,
    unswapped,
)
from llavakit_plugins.generation.requests.booking import counts_all

_REVIEW_TOKENS = 114  # the median of the published reviews (haotian-liu/LLaVA)
_SYSTEM = "You compare the answers of two assistants to a question about an image, fairly."
_BLIND = "You cannot see the image; the context above says what is in it."
_SEEING = "The image is attached: judge by what you see in it."
_RULE = (
    "{told} Rate how well each assistant "
    "answers the question: whether the answer helps, keeps to the question, is accurate, and says "
    "as much as it should. Give each a score from 1 to 10; a higher one is better.\n"
    "Write on the first line nothing but the two scores, that of Assistant 1 first, with one space "
    "between them. Explain them in the lines after it. The order in which the answers are shown "
    "must not matter."
)


class LlavaBenchOptions(Options):
    """Options of `llava-bench`."""

    questions: InputPath
    """One `{"question_id", "image", "text", "category"}` per line."""
    images: InputPath | None = None
    """The folder of the images; by default the folder of the question file."""
    references: InputPath
    """The reference's answers, one `{"question_id", "text"}` per line; in the paper GPT-4's."""
    contexts: InputPath | None = None
    """What the judge knows of each image: one `{"image", "caption"}` or `{"image", "captions",
    "instances"}` per line. Needed unless the judge sees the images."""
    show_images: bool = False
    """Whether the judge is shown the image, beside its context where there is one."""
    judge: Use[ChatModel]
    swap: bool = False
    """Also ask with the candidate's answer first, and use the mean of both orders."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many questions from the start."""
    concurrency: int = Field(default=8, ge=1)
    """Requests to the judge that are in flight at once."""
    seed: int = 0
    """Seed of the bootstrap."""
    reading: Reading = "first-line"
    """How scores are read from a review. `first-line`: two plain numbers on the first line, as for
    published figures. `tolerant`: also what is clearly meant, such as `**8/10** **9/10**` behind an
    empty line."""


@dataclass(frozen=True)
class _Review:
    question: Question
    swapped: bool
    text: str | None
    scores: Pair | None
    """Scores of the two answers in the order shown; None if the review has no scores."""

    def row(self) -> dict[str, Any]:
        """Return the line of a review file, in LLaVA's format."""
        return {
            "question_id": self.question.id,
            "category": self.question.category,
            "content": self.text or "",
            "tuple": None if self.scores is None else list(self.scores),
            "swapped": self.swapped,
        }


class LlavaBench(Benchmark):
    """LLaVA-Bench (COCO) or LLaVA-Bench (In-the-Wild), rated by a judge.

    The judge sees the reference's answer first. The relative score is the mean of the candidate's
    scores in percent of the reference's mean. Reviews without two scores on the first line are left
    out; their number is reported as `unparsed`.
    """

    name = "llava-bench"
    Options = LlavaBenchOptions
    scorers = (ReviewFiles,)

    def __init__(self, options: LlavaBenchOptions, *, build: Build) -> None:
        self.options = options
        self.judge = build(options.judge)
        if options.contexts is None and not options.show_images:
            raise DataError(
                "`llava-bench` needs `contexts`, what its judge knows of the images, or "
                "`show_images = true` for a judge that sees them"
            )
        self.contexts = {} if options.contexts is None else _read_contexts(options.contexts)
        self.shown: dict[str, tuple[ImageSource, ...]] = {}
        references = read_answers(options.references).texts
        question_rows = read_questions(options.questions, options.images, options.limit)
        self.found: list[Question] = []
        self.context_of: dict[str, str] = {}
        lacking: list[str] = []
        # all of this is checked before a question is asked,
        # as answers and reviews cost hours and money
        for item in question_rows:
            identity, image = str(item.question.id), str(item.row.get("image"))
            if identity not in references:
                lacking.append(identity)
                continue
            if options.contexts is not None and image not in self.contexts:
                raise DataError(
                    f"{options.contexts} says nothing of `{image}` (question `{identity}`); add it"
                )
            self.context_of[identity] = self.contexts.get(image, "")
            if options.show_images:  # those of the question, also where it is asked with others
                self.shown[identity] = item.question.images
            self.found.append(replace(item.question, truth=references[identity]))
        if lacking:
            raise DataError(f"{options.references} has no answer to {listed(lacking)}; add it")

    def questions(self) -> Sequence[Question]:
        return self.found

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        return self._score(*self._ask(questions, answers, JudgeSettings(self.options.concurrency)))

    def score_in(self, run: Run, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        settings = JudgeSettings.within(run, self.options.concurrency)
        reviews, said = self._ask(questions, answers, settings)
        lines = [json.dumps(review.row(), ensure_ascii=False) for review in reviews]
        write_text(run.directory / "reviews.jsonl", "\n".join(lines) + "\n")
        return self._score(reviews, said)

    def price(self) -> StepPlan:
        """Return what the judge will cost, for answers as long as the references."""
        ways = 2 if self.options.swap else 1
        # what the candidate will answer is not known yet:
        # the reference's answer has about its length
        asked = [self._messages(question, question.truth, False) for question in self.found]
        sent = ways * sum(map(self.judge.count, asked))
        made = ways * len(asked) * _REVIEW_TOKENS
        known = all(counts_all(self.judge, messages) for messages in asked)
        usd = self.judge.price(sent, made) if known else None
        stated = "price" if known else "image_tokens"
        cost = (
            f"no price is known; state `{stated}` beside it" if usd is None else f"{usd:,.2f} USD"
        )
        note = f"judge: {ways * len(asked):,} requests, about {sent:,} tokens sent, {cost}"
        return StepPlan(cost_usd=usd, note=note)

    def _ask(
        self, questions: Sequence[Question], answers: Sequence[str], settings: JudgeSettings
    ) -> tuple[list[_Review], Replies]:
        ways = (False, True) if self.options.swap else (False,)
        prompts = [
            (question, swapped, self._messages(question, answer, swapped))
            for question, answer in zip(questions, answers, strict=True)
            for swapped in ways
        ]
        labels = [f"{q.id}{', swapped' if swapped else ''}" for q, swapped, _ in prompts]
        said = replies(self.judge, [messages for *_, messages in prompts], labels, settings)
        pairs = zip(prompts, said.texts, strict=True)
        reading = self.options.reading
        return [
            _Review(q, way, text, read_scores(text or "", reading)) for (q, way, _), text in pairs
        ], said

    def _messages(self, question: Question, answer: str, swapped: bool) -> tuple[Message, ...]:
        # judges tend to prefer one position, which `swap` balances
        first, second = (answer, question.truth) if swapped else (question.truth, answer)
        context, shown = self.context_of[str(question.id)], self.shown.get(str(question.id), ())
        parts = [
            *([f"[Context]\n{context}"] if context else []),
            # the parts are named as in the original's requests to its judge;
            # the rule's words are our own
            f"[Question]\n{question.prompt}",
            f"[Assistant 1]\n{first}\n\n[End of Assistant 1]",
            f"[Assistant 2]\n{second}\n\n[End of Assistant 2]",
            f"[System]\n{_RULE.format(told=_SEEING if shown else _BLIND)}",
        ]
        return Message("system", _SYSTEM), Message("user", "\n\n".join(parts), shown)

    def _score(self, reviews: Sequence[_Review], said: Replies) -> Score:
        groups: dict[str, list[_Review]] = {}
        for review in reviews:
            # with `swap` a question has two reviews, which count as one
            groups.setdefault(str(review.question.id), []).append(review)
        scores = {
            name: mean_pair(unswapped(r.scores, r.row()) for r in group)
            for name, group in groups.items()
        }
        categories = {name: group[0].question.category for name, group in groups.items()}
        results, unparsed = summarise(scores, categories, self.options.seed)
        metrics = {"unparsed": float(len(unparsed)), **said.metrics()}
        for category, result in results.items():
            metrics[f"relative_{category}"] = result.relative
        if whole := results.get("all"):
            metrics |= {"relative_low": whole.low, "relative_high": whole.high}
            metrics |= {"reference": whole.reference, "candidate": whole.candidate}
        caption = f"95 % bootstrap interval over questions. Judge: {self.judge.name}."
        if unparsed:
            caption += f" Without two scores, counted nowhere: {listed(unparsed)}."
        table = Table(
            title="LLaVA-Bench: relative score",
            columns=RELATIVE_COLUMNS,
            rows=relative_rows(results),
            caption=caption,
        )
        remarks = ["\n\n".join(r.text or "(no review)" for r in group) for group in groups.values()]
        return Score(metrics, [None] * len(groups), [table], remarks)


def _read_contexts(path: Path) -> Mapping[str, str]:
    """Return what the judge knows of each image, by the image's name."""
    found: dict[str, str] = {}
    for where, row in read_rows(path):
        image = text_of(row, "image", where)
        if image in found:
            raise DataError(f"{where}: image `{image}` is there more than once; keep one row")
        found[image] = _context(row, where)
    return found


def _context(row: Row, where: str) -> str:
    """Return captions and then boxes, in the form that a generator's teacher gets."""
    # LLaVA-Bench (In-the-Wild) has `caption`; LLaVA-Bench (COCO) has `captions` and `instances`
    captions = row.get("captions", row.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    boxes = row.get("instances") or []
    if not isinstance(captions, list) or not captions or not isinstance(boxes, list):
        raise DataError(f"{where}: a context needs `caption`, or `captions` and `instances`")
    try:
        lines = [f"{b['category']}: {[round(float(x), 3) for x in b['bbox']]}" for b in boxes]
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: an instance has `category` and `bbox` of numbers, got {error}"
        ) from error
    text = "\n".join(map(str, captions))
    return f"{text}\n\n{chr(10).join(lines)}" if lines else text
