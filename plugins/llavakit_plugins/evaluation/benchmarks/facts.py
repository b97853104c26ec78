"""A judge that needs no network: it checks which stated facts are true, and which are missing.

It knows the world of the step `scenes`: coloured digits at four positions of a coloured canvas. The
truth about a scene is read from its captions, and what an answer should say from the teacher's
answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from pydantic import Field

from llavakit import Benchmark, Build, DataError, Dataset, InputPath, Options, Question, Score, Use
from llavakit.contracts.data import IMAGE, ImageContext
from llavakit_plugins.generation.contexts import read_contexts

Fact = tuple[str, str]
"""A subject and what is said of it, such as `("left colour", "red")`."""

_BEST = 10.0  # the upper end of the judge's scale in arXiv 2304.08485, section 5.1
_PLACES = ("top", "left", "right", "bottom")
_COLOUR = "red|green|blue|black|white|yellow|pink|grey|gray|brown|orange|purple"
_UNITS = "zero|one|two|three|four|five|six|seven|eight|nine"
_NUMBER = (
    f"(?:twenty(?:-(?:{_UNITS}))?|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    f"eighteen|nineteen|{_UNITS})"
)
_CANVAS = re.compile(
    rf"\b({_COLOUR}) (?:canvas|background)\b|\b(?:canvas|background) is ({_COLOUR})\b"
)
_COUNT = re.compile(rf"\b({_NUMBER}) digits?\b")
_LISTED = re.compile(rf"\bdigits? (?:is|are) ({_NUMBER}(?:(?:,| and|, and) {_NUMBER})*)\b")
_CONCLUSION = re.compile(rf"\b(sum|largest|smallest)(?: digit)? is ({_NUMBER})\b")
_PARITY = re.compile(r"\bis (odd|even)\b")
_WORD = re.compile(rf"\b(?:({'|'.join(_PLACES)})|({_COLOUR})|({_NUMBER})|(empty))\b")
_CONCLUDED = ("sum", "largest", "smallest", "parity")


def facts_in(text: str) -> frozenset[Fact]:
    """Return the facts that a text states; their order and the words between do not matter."""
    return frozenset(
        fact for sentence in re.split(r"[.!?\n]+", text.lower()) for fact in _facts(sentence)
    )


def _facts(sentence: str) -> Iterator[Fact]:
    # What one pattern has read is removed, so that a later one does not read it again: the canvas's
    # colour is not a digit's, and a sum is not a digit of the scene.
    for match in _CANVAS.finditer(sentence):
        yield "canvas", match[1] or match[2]
    sentence = _CANVAS.sub(" ", sentence)
    for match in _CONCLUSION.finditer(sentence):
        yield match[1], match[2]
    sentence = _CONCLUSION.sub(" ", sentence)
    for match in _PARITY.finditer(sentence):
        yield "parity", match[1]
    for match in _LISTED.finditer(sentence):
        for number, value in enumerate(re.findall(_NUMBER, match[1]), start=1):
            yield f"digit {number}", str(value)
    sentence = _LISTED.sub(" ", sentence)
    for match in _COUNT.finditer(sentence):
        yield "count", match[1]
    # a position holds for the words after it, up to the next one: `the left shows a red two`
    where = ""
    for match in _WORD.finditer(_COUNT.sub(" ", sentence)):
        found, colour, digit, empty = match.groups()
        where = found or where
        if where and not found:
            yield f"{where} {'colour' if colour else 'holds'}", colour or digit or empty


def scene_facts(context: ImageContext) -> frozenset[Fact]:
    """Return all true facts of a scene: those of its captions, and which positions are empty."""
    # a position that no caption names holds nothing: captions of scenes name every digit
    told = frozenset(fact for caption in context.captions for fact in facts_in(caption))
    taken = {subject.split()[0] for subject, _ in told}
    empty = ((f"{place} holds", "empty") for place in _PLACES if place not in taken)
    held = [
        match[3]
        for match in _WORD.finditer(_COUNT.sub(" ", _CANVAS.sub(" ", context.captions[0].lower())))
        if match[3]
    ]
    listed = ((f"digit {number}", value) for number, value in enumerate(held, start=1))
    return told | frozenset(empty) | frozenset(listed)


class FactsOptions(Options):
    """Options of `facts`."""

    data: tuple[Use[Dataset], ...] = Field(min_length=1)
    """The teacher's answers on held-out scenes, one data set for each kind of response."""
    contexts: InputPath
    """Captions of the same scenes."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many samples of each data set, drawn with `seed`."""
    seed: int = 0


class Facts(Benchmark):
    """LLaVA-Bench's relative score, computed by a rule: 100 means as good as the teacher's answers.

    An answer's score, 0 to 10, is the harmonic mean of precision and recall: the share of its facts
    that are true, and the share of the teacher's facts that it states. The teacher's answers are
    scored by the same rule. `relative` is the ratio of the means in percent (arXiv 2304.08485,
    section 5.1), over all questions and by kind of response. `conclusion` is the share of
    arithmetic questions with the right result; reasons do not count. Only the first question of
    each sample is used.

    Raises DataError if a sample's scene is not among the contexts, or if a teacher's answer states
    no known fact.
    """

    name = "facts"
    Options = FactsOptions

    def __init__(self, options: FactsOptions, *, build: Build) -> None:
        self.options = options
        self._data = [build(use) for use in options.data]
        self._truth: dict[int | str, frozenset[Fact]] = {}

    def questions(self) -> Sequence[Question]:
        scenes = {c.image: scene_facts(c) for c in read_contexts(self.options.contexts)}
        found: list[Question] = []
        for number, data in enumerate(self._data):
            indices = range(len(data))
            if self.options.limit is not None and self.options.limit < len(data):
                draw = np.random.default_rng([self.options.seed, number])
                chosen = draw.choice(len(data), self.options.limit, replace=False)
                indices = sorted(chosen.tolist())  # type: ignore[assignment]
            for index in indices:
                sample = data[index]
                image = sample.images[0] if sample.images else None
                name = image.name if isinstance(image, Path) else ""
                if name not in scenes:
                    raise DataError(
                        f"sample `{sample.id}` shows no scene of {self.options.contexts}; give the "
                        "contexts that its data were generated from"
                    )
                prompt = sample.turns[0].text.replace(IMAGE, "").strip()
                answer = sample.turns[1].text if len(sample.turns) > 1 else ""
                if not facts_in(answer):
                    raise DataError(
                        f"the teacher's answer to sample `{sample.id}` states no fact of a scene: "
                        f"`{answer}`; `facts` judges data of the step `scenes` only"
                    )
                question = Question(sample.id, prompt, sample.images, answer, sample.kind)
                self._truth[question.id] = scenes[name] | facts_in(answer)
                found.append(question)
        return found

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        marks, best, sorts, concluded = [], [], [], []
        for question, answer in zip(questions, answers, strict=True):
            asked, said = facts_in(question.truth), facts_in(answer)
            truth = self._truth[question.id]
            marks.append(_mark(said, asked, truth))
            best.append(_mark(asked, asked, truth))
            sorts.append(question.category)
            if results := _conclusions(asked):
                concluded.append(_conclusions(said) == results)
        # a ratio of means and not a mean of ratios, as in LLaVA-Bench
        metrics = {"relative": _relative(marks, best)}
        for sort in dict.fromkeys(filter(None, sorts)):
            own = [index for index, other in enumerate(sorts) if other == sort]
            metrics[f"relative_{sort}"] = _relative(
                [marks[index] for index in own], [best[index] for index in own]
            )
        if concluded:
            metrics["conclusion"] = fmean(concluded)
        return Score(metrics, [mark == _BEST for mark in marks])


def _mark(said: frozenset[Fact], asked: frozenset[Fact], truth: frozenset[Fact]) -> float:
    """Return the score, 0 to 10: the harmonic mean of precision and recall."""
    true = len(said & truth) / len(said) if said else 0.0
    complete = len(said & asked) / len(asked)
    return _BEST * 2 * true * complete / (true + complete) if true and complete else 0.0


def _relative(marks: Sequence[float], best: Sequence[float]) -> float:
    return 100 * fmean(marks) / fmean(best)


def _conclusions(facts: frozenset[Fact]) -> frozenset[Fact]:
    return frozenset(fact for fact in facts if fact[0] in _CONCLUDED)
