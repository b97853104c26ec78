"""Reads a teacher's reply, and decides whether it can be used, with or without a repair.

The requested layout is `Question:`, text, `===`, `Answer:`, text, `===`, repeated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from llavakit import ImageContext
from llavakit_plugins.generation.requests.thinking import THOUGHT, UNCLEAR, without_thinking

REFUSED = "the teacher refuses"
WITHHELD = "withheld by the service's content filter"
CUT = "cut at the longest reply"
EMPTY = "empty"
NO_LAYOUT = "no question and answer found"
ORPHAN = "an answer without its question"
MENTION = "speaks of captions, boxes or coordinates"
MARKER = "holds a marker that prompts are made of"
NO_TEXT = "holds characters that are no text"
RULE = "holds a rule between its lines"

Pair = tuple[str, str]

# Patterns are wide where models vary in layout (emphasis, numbers, code blocks), and narrow where
# they reject a reply: a reply that is paid for should not be lost by a word.
_SEPARATOR = re.compile(r"^[\s*`]*={3,}[\s*`]*$")
_RULE = re.compile(r"^[ \t]*(?:[-–—―─━═~]{3,}|(?:[-*_][ \t]*){3,}|⸻+)[ \t]*$", re.MULTILINE)
_LABEL = re.compile(
    r"^[\s*_#>`-]*(?P<role>question|answer|Q|A)\s*\d*\s*[*_]*\s*:\s*[*_]*(?P<rest>.*)$",
    re.IGNORECASE,
)
_PLAIN_LABEL = re.compile(r"^(Question|Answer):$")
_FENCE = re.compile(r"^\s*```\w*\s*$")
_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m (?:very )?sorry\b|i am (?:very )?sorry\b|sorry,|i apologi[sz]e|"
    r"i (?:cannot|can['’]?t|am unable to|am not able to|won['’]?t) (?:help|assist|provide|answer|"
    r"create|generate|describe|see|view|write|fulfil|comply)|unfortunately,? i\b)"
    r"|\bas an ai\b|\b(?:ai|language) model\b"
    r"|\bi (?:cannot|can['’]?t|am unable to|am not able to|don['’]?t|do not) "
    r"(?:actually |directly )?(?:see|view|access|look at) (?:the|this|any|an|images?|photos?)\b",
    re.IGNORECASE,
)
# In a training text such a marker would be read as an image or as the end of a turn.
_MARKER = re.compile(r"<image>|</?s>|<\|\w+\|>|^#{3,}\s", re.MULTILINE)
# Control characters, changes of writing direction, lone surrogates, and U+FFFD, which stands for
# bytes that could not be decoded. Tab and newline are allowed.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffd]"
)
# Coordinates of a box, such as `(0.12, 0.5`: the model that is trained must not learn to name them.
_NUMBERS = re.compile(r"[\[(]\s*\d*\.\d+\s*,\s*\d*\.?\d+")
_TOLD = re.compile(
    r"\bbounding[- ]box|\b(?:provided|given) (?:sentences?|descriptions?|text|list|information|"
    r"context)\b|\b(?:the|these|those) (?:sentences|descriptions)\b",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"^(?:(?:sure|certainly|of course|absolutely|okay|ok|gladly)(?: thing)?[!.,:]\s*)?"
    r"(?:here(?:['’]s| is| are)\b[^:\n]{0,100}:\s*)?",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"(?:(?<=[.!?])\s+|\n+)(?:please )?(?:let me know|feel free to|i hope (?:this|that)|"
    r"(?:would|if) you (?:like|need|want|have))\b[^\n]*$",
    re.IGNORECASE,
)
_WORDS = ("caption", "box", "coordinate")


@dataclass
class Read:
    """What a reply says, pair by pair, and what had to be done to it."""

    pairs: list[Pair] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    reason: str = ""
    """Why nothing can be used, where that is so."""

    def repair(self, note: str) -> None:
        """Note a repair once."""
        if note not in self.repairs:
            self.repairs.append(note)


def complaint(text: str, context: ImageContext) -> str:
    """Return why a text of the teacher cannot be used, or nothing."""
    if not text.strip():
        return EMPTY
    if _REFUSAL.search(text):
        return REFUSED
    if _MARKER.search(text):
        return MARKER
    if _UNPRINTABLE.search(text):
        return NO_TEXT
    if _RULE.search(text):
        return RULE
    if _NUMBERS.search(text) or _TOLD.search(text):
        return MENTION
    known = " ".join([*context.captions, *(box.category for box in context.boxes)]).lower()
    for word in _WORDS:  # a cardboard box is no mention of a box around things
        if re.search(rf"\b{word}(?:e?s)?\b", text, re.IGNORECASE) and word not in known:
            return MENTION
    return ""


def read_pairs(text: str, finish: str, context: ImageContext) -> Read:
    """Return the usable questions and answers of a reply, in order."""
    read = Read()
    text = _answer(text, finish, read)
    if read.reason and read.reason != CUT:
        return read
    read.reason = ""
    blocks = _blocks(text, read)
    closed = bool(_SEPARATOR.match(text.rstrip().rpartition("\n")[2]))
    # what was cut is the last block; if a separator follows it, it was complete
    if finish == "length" and not closed and blocks:
        blocks.pop()
        read.repair(f"{CUT}: what was not finished is dropped")
    pairs = _pair_up(blocks, read)
    if not pairs:
        refused = _REFUSAL.search(text)
        read.reason = CUT if finish == "length" else REFUSED if refused else NO_LAYOUT
        return read
    seen: set[str] = set()
    reasons = []
    for question, answer in pairs:
        reason = complaint(question, context) or complaint(answer, context)
        if reason:
            reasons.append(reason)
            read.repair(f"a pair is dropped: {reason}")
        elif (key := fold(question)) in seen:
            read.repair("a question that was asked before is dropped")
        else:
            seen.add(key)
            read.pairs.append((question, answer))
    # where most pairs are bad, the teacher has misunderstood the task:
    # the rest is not to be trusted
    if len(reasons) * 2 > len(pairs) or not read.pairs:
        return Read(reason=reasons[0] if reasons else EMPTY)
    return read


def read_prose(text: str, finish: str, context: ImageContext) -> tuple[str, Read]:
    """Return the one text that a reply consists of."""
    read = Read()
    text = _answer(text, finish, read)
    if read.reason:
        return "", read
    lines = text.strip().splitlines()
    framed = len(lines)
    # a rule within the text is part of what `complaint` rejects; around it, it is only a frame
    for end in (0, -1):
        while lines and (_RULE.match(lines[end]) or not lines[end].strip()):
            del lines[end]
    if len(lines) != framed:
        read.repair("a rule around it is taken away")
    if any(_FENCE.match(line) for line in lines):
        lines = [line for line in lines if not _FENCE.match(line)]
        read.repair("taken out of a code block")
    if any(_SEPARATOR.match(line) or _PLAIN_LABEL.match(line.strip()) for line in lines):
        pairs = _pair_up(_blocks("\n".join(lines), read), read)
        prose = pairs[0][1] if pairs else ""
        read.repair("taken out of a layout that was not asked for")
    else:
        prose = "\n".join(lines).strip()
        bare = re.sub(r"^\W*(?:description|answer)\W*:\W*", "", prose, flags=re.IGNORECASE)
        if bare != prose:
            read.repair("a label in front is taken away")
        prose = _CLOSING.sub("", _OPENING.sub("", bare, count=1))
        if prose != bare:
            read.repair("what is said to the person who asked is taken away")
    read.reason = complaint(prose, context)
    return prose, read


def fold(text: str) -> str:
    """Return a text by which near-equal ones are told to be the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _answer(text: str, finish: str, read: Read) -> str:
    """Return a reply without its thinking; `read.reason` says where nothing of it can be used."""
    answer = without_thinking(text)
    if finish == "content_filter":
        read.reason = WITHHELD
    elif finish == "refusal":
        read.reason = REFUSED
    elif answer is None:
        read.reason = UNCLEAR
    elif finish == "length":
        read.reason = CUT
    elif not answer.strip():
        read.reason = EMPTY
    if answer is not None and answer != text:
        read.repair(THOUGHT)
    return answer or ""


def _blocks(text: str, read: Read) -> list[tuple[str, str]]:
    """Return (role, text) of each labelled stretch."""
    blocks: list[tuple[str, list[str]]] = []
    is_open = False
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if _FENCE.match(line):
            read.repair("taken out of a code block")
        elif _SEPARATOR.match(line):
            is_open = False
        elif _RULE.match(line) and _ends_block(lines[number + 1 :]):
            read.repair("a separator was written in another way")
            is_open = False
        elif label := _LABEL.match(line):
            role, rest = label["role"][0].upper(), label["rest"].strip()
            if is_open:
                read.repair("a separator was missing")
            if not _PLAIN_LABEL.match(line.strip()):
                read.repair("a label was written in another way")
            blocks.append((role, [rest] if rest else []))
            is_open = True
        elif is_open:
            blocks[-1][1].append(line)
        elif line.strip():
            read.repair("text outside of the layout is dropped")
    return [(role, "\n".join(own).strip()) for role, own in blocks]


def _ends_block(rest: Sequence[str]) -> bool:
    """Say whether a rule stands where a separator belongs, and not within a text."""
    following = next((line for line in rest if line.strip() and not _FENCE.match(line)), "")
    ends = not following or _LABEL.match(following) or _SEPARATOR.match(following)
    return bool(ends or _RULE.match(following))


def _pair_up(blocks: Sequence[tuple[str, str]], read: Read) -> list[Pair]:
    """Return questions with the answers that follow them."""
    pairs: list[Pair] = []
    question: str | None = None
    for role, text in blocks:
        if role == "Q":
            if question is not None:
                read.repair("a question without an answer is dropped")
            question = text
        elif question is None:
            read.repair(f"{ORPHAN} is dropped")
        else:
            pairs.append((question, text))
            question = None
    if question is not None:
        read.repair("a question without an answer is dropped")
    return pairs
