"""The answer normaliser and the accuracy of VQA's evaluation server.

Source: https://visualqa.org/evaluation.html. TextVQA, VizWiz and LLaVA's scripts use the same one.
Its slips are kept, because published figures were computed with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = int(re.UNICODE)  # the original passes this flag as the number of periods to remove
_PROPER = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't shouldn't've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd
you'd've you'll you're you've 'twas he'd've she'd've we'd've somebody'd've y'all'll y'all'd've
'ow's'at
"""


def _contractions() -> dict[str, str]:
    """Return the correct form of each contraction with one apostrophe missing."""
    return {
        word[:index] + word[index + 1 :]: word
        for word in _PROPER.split()
        for index, letter in enumerate(word)
        if letter == "'"
    }


_CONTRACTIONS = _contractions() | {"somebody'd": "somebodyd"}  # a slip of the original's table


def normalise(text: str) -> str:
    """Return an answer in the form that is compared: lower case, no articles, no punctuation, and
    number words as digits.

    As in the original, a punctuation mark is removed if one of its kind stands beside a space, or
    if the text has a number with a comma; otherwise it becomes a space.
    """
    # M4C's `word_tokenize`, which LLaVA's TextVQA script runs before VQA's own steps
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        dropped = beside_space or _COMMA_IN_NUMBER.search(text) is not None
        plain = plain.replace(mark, "" if dropped else " ")
    # periods within numbers stay: 3.5 is not 35
    plain = _PERIOD.sub("", plain, _PERIODS)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer, 0 to 1.

    It is the mean, over each person left out in turn, of min(1, agreeing others / 3). A single
    truth has to be met exactly.
    """
    said = normalise(answer)
    agreeing = [normalise(truth) == said for truth in truths]
    # VQA's rule needs other people; with one truth none is left, and the accuracy would always be 0
    if len(truths) == 1:
        return float(agreeing[0])
    total = sum(agreeing)
    return sum(min(1.0, (total - own) / 3) for own in agreeing) / len(agreeing)
