"""A teacher that needs no network: it reads captions and boxes by rules and writes the three
response types of the paper (arXiv 2304.08485, section 3). It never sees an image.

From boxes it takes the things, their number and their positions; from captions the colour before a
category's name (`a red bus`), and the background (`on a … canvas`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np
from pydantic import Field

from llavakit import DataError, Generator, ImageContext, Options, Turn
from llavakit.contracts.data import IMAGE, Box, ResponseKind
from llavakit_plugins.generation.rows import pick

COLOURS = (
    "red", "green", "blue", "black", "white", "yellow", "pink", "grey", "gray", "brown", "orange",
    "purple",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty", "twenty-one", "twenty-two", "twenty-three", "twenty-four",
    "twenty-five", "twenty-six", "twenty-seven",
)  # fmt: skip
DETAIL = (
    "Describe the image in detail.",
    "What can be seen in this image, in full?",
    "Give a detailed account of the image.",
    "Tell me everything that the image shows.",
)


_PLACES = ("top", "left", "right", "bottom")


@dataclass(frozen=True)
class Thing:
    """One object as the teacher understands it."""

    category: str
    place: str
    colour: str | None


@dataclass(frozen=True)
class View:
    """What the teacher makes of a context."""

    things: tuple[Thing, ...]
    ground: str | None
    noun: str
    """What to call the things: `digit` where all are number words, else `object`."""


def understand(context: ImageContext) -> View:
    """Read captions and boxes. Raises DataError where there are no boxes to read."""
    if not context.boxes:
        raise DataError(
            f"context `{context.id}` has no boxes, so the offline teacher knows nothing to ask; "
            "choose another generator or remove it"
        )
    text = " ".join(context.captions).lower()
    palette = "|".join(COLOURS)
    used: dict[str, int] = {}
    things = []
    for box in context.boxes:
        name = box.category.lower()
        # a caption of the scenes names things in the order of their boxes: the n-th colour before a
        # category's name is that of its n-th box
        colours = re.findall(rf"\b({palette}) {re.escape(name)}\b", context.captions[0].lower())
        number = used.get(name, 0)
        used[name] = number + 1
        colour = colours[number] if number < len(colours) else None
        things.append(Thing(name, place_of(box), colour))
    ground = re.search(rf"\bon an? ({palette}) (?:canvas|background)\b", text)
    digits = all(thing.category in NUMBERS[:10] for thing in things)
    return View(tuple(things), ground[1] if ground else None, "digit" if digits else "object")


def place_of(box: Box) -> str:
    """Return the edge that the middle of a box is nearest to: `top`, `left`, `right`, `bottom`."""
    left, top, right, bottom = box.corners
    across, down = (left + right) / 2, (top + bottom) / 2
    distances = (down, across, 1 - across, 1 - down)
    return _PLACES[distances.index(min(distances))]


class OfflineOptions(Options):
    seed: int = 0
    turns: int = Field(default=3, ge=1)
    """Most questions of one conversation."""
    reasoning: Literal["reason-first", "answer-first"] = "reason-first"
    """Whether an answer to a question of reasoning says why before or after it says what."""


class Offline(Generator):
    """Always the same conversation for the same context, kind and seed."""

    name = "offline"
    Options = OfflineOptions

    def __init__(self, options: OfflineOptions) -> None:
        self.options = options
        self._understood: tuple[ImageContext, View] | None = None

    def generate(self, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        # a seed of its own for each sample:
        # the result does not depend on the order or on the others
        key = f"{self.options.seed}/{context.id}/{kind}".encode()
        draw = np.random.default_rng(int.from_bytes(sha256(key).digest()[:8], "big"))
        # a context comes once for each kind, one behind the other
        known = self._understood
        if known is None or known[0] is not context:
            known = self._understood = context, understand(context)
        view = known[1]
        write = {
            "conversation": self._conversation,
            "detail": _detail,
            "reasoning": self._reasoning,
        }
        pairs = write[kind](view, draw)
        turns: list[Turn] = []
        for number, (question, answer) in enumerate(pairs):
            # as LLaVA's files have it: the image stands in the first question alone
            mark = f"{IMAGE}\n" if number == 0 else ""
            turns += [Turn("human", mark + question), Turn("gpt", answer)]
        return turns

    def _conversation(self, view: View, draw: np.random.Generator) -> list[tuple[str, str]]:
        order = draw.permutation(len(_FORMS)).tolist()
        # every form is tried before the cut, so that the draws do not depend on `turns`
        pairs = [pair for form in order if (pair := _FORMS[form](view, draw)) is not None]
        return pairs[: self.options.turns]

    def _reasoning(self, view: View, draw: np.random.Generator) -> list[tuple[str, str]]:
        question, reason, result = _reason(view, draw)
        if self.options.reasoning == "answer-first":
            return [(question, f"{result}, because {reason}.".capitalize())]
        return [(question, f"{reason}, so {result}.".capitalize())]


# -- conversation: one question of each form, each with one right answer ---------------------------

Pair = tuple[str, str]


def _alone(view: View, key: Callable[[Thing], str | None]) -> list[Thing]:
    """Return the things that share the key with no other."""
    keys = [key(thing) for thing in view.things]
    return [t for t, own in zip(view.things, keys, strict=True) if own and keys.count(own) == 1]


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" and noun != "one" else f"a {noun}"


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _shows(thing: Thing) -> str:
    """Say what is at a position, always in the same words: a short training learns only one way."""
    named = f"{thing.colour} {thing.category}" if thing.colour else thing.category
    return f"the {thing.place} shows {_article(named)}"


def _which(view: View, draw: np.random.Generator) -> Pair | None:
    if not (alone := _alone(view, lambda thing: thing.place)):
        return None
    thing = pick(draw, alone)
    where = f" at the {thing.place}" if len(view.things) > 1 else ""
    return f"Which {view.noun} is there{where}?", f"{_shows(thing)}.".capitalize()


def _colour(view: View, draw: np.random.Generator) -> Pair | None:
    coloured = [thing for thing in _alone(view, lambda thing: thing.place) if thing.colour]
    if not coloured:
        return None
    thing = pick(draw, coloured)
    where = f" at the {thing.place}" if len(view.things) > 1 else ""
    return f"What colour is the {view.noun}{where}?", f"{_shows(thing)}.".capitalize()


def _where(view: View, draw: np.random.Generator) -> Pair | None:
    # with several things there is no single right place
    if len(view.things) > 1:
        return None
    return f"Where is the {view.noun}?", f"{_shows(view.things[0])}.".capitalize()


def _ground(view: View, draw: np.random.Generator) -> Pair | None:
    if view.ground is None:
        return None
    return "What colour is the canvas?", f"The canvas is {view.ground}."


def _count(view: View, draw: np.random.Generator) -> Pair | None:
    count = len(view.things)
    if count == 1:  # a question is only asked where the image is needed to answer it
        return None
    return f"How many {view.noun}s are there?", f"There are {_number(count)} {view.noun}s."


def _exists(view: View, draw: np.random.Generator) -> Pair | None:
    """Ask about a taken and about a free position equally often."""
    if len(view.things) == 1:
        return None
    taken = _alone(view, lambda thing: thing.place)
    free = [place for place in _PLACES if all(thing.place != place for thing in view.things)]
    if not taken or not free:
        return None
    # half of the answers are yes: otherwise a model could learn to say yes without looking
    if draw.integers(2):
        thing = pick(draw, taken)
        return f"Is there a {view.noun} at the {thing.place}?", f"Yes, {_shows(thing)}."
    place = pick(draw, free)
    return f"Is there a {view.noun} at the {place}?", f"No, the {place} is empty."


_FORMS = (_which, _colour, _where, _ground, _count, _exists)


# -- detail and reasoning --------------------------------------------------------------------------


def _detail(view: View, draw: np.random.Generator) -> list[Pair]:
    count = len(view.things)
    amount = _number(count)
    start = f"The canvas is {view.ground} with" if view.ground else "The image shows"
    sentences = [f"{start} {amount} {view.noun}{'' if count == 1 else 's'}."]
    sentences += [f"{_shows(thing)}.".capitalize() for thing in view.things]
    return [(pick(draw, DETAIL), " ".join(sentences))]


def _reason(view: View, draw: np.random.Generator) -> tuple[str, str, str]:
    """Return a question of reasoning, the reason and what follows from it."""
    if view.noun == "digit":
        return _arithmetic([NUMBERS.index(thing.category) for thing in view.things], draw)
    categories = [thing.category for thing in view.things]
    most = max(categories, key=categories.count)
    number = categories.count(most)
    amount = _number(number)
    are = f"is {_article(most)}" if number == 1 else f"are of the sort {most}"
    reason = f"of the {len(categories)} objects, {amount} {are}, and no other sort has more"
    question = "What is this image mainly about, and how can you tell?"
    return question, reason, f"the image is mainly about {_article(most)}"


def _arithmetic(digits: Sequence[int], draw: np.random.Generator) -> tuple[str, str, str]:
    if len(digits) == 1:
        kind = "odd" if digits[0] % 2 else "even"
        return "Is the digit even or odd?", f"the digit is {NUMBERS[digits[0]]}", f"it is {kind}"
    seen = f"the digits are {' and '.join(NUMBERS[digit] for digit in digits)}"
    forms = ["largest", "smallest"] + ["sum"] * (2 * (len(digits) == 2))
    form = pick(draw, forms)
    if form == "sum":
        return "What is the sum of the digits?", seen, f"the sum is {NUMBERS[sum(digits)]}"
    value = max(digits) if form == "largest" else min(digits)
    return f"What is the {form} digit?", seen, f"the {form} is {NUMBERS[value]}"
