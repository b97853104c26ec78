"""Finds the noun phrases of captions. Imports nothing heavy, because worker processes load it.

`light_phrases` uses no grammar but lists of words: the words between determiners, prepositions,
verbs and the like are a phrase. In captions it finds most of the phrases that a parser finds.
"""

from __future__ import annotations

import re
import sys
import tomllib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

LIGHT = "light"
"""The name of the built-in chunker. Any other name is a model of spaCy."""

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+|[^\w\s]")

_WORDS = {
    name: frozenset(words.split())
    for name, words in tomllib.loads(
        files("llavakit_plugins.generation.curation")
        .joinpath("phrases.toml")
        .read_text(encoding="utf-8")
    ).items()
}
_DETERMINERS, _SMALL, _VERBS = _WORDS["determiners"], _WORDS["small"], _WORDS["verbs"]
_NOUNS, _MODIFIERS = _WORDS["nouns"], _WORDS["modifiers"]


def light_phrases(caption: str) -> list[str]:
    """Return the noun phrases of a caption in order, each once, without determiners."""
    found: dict[str, None] = {}
    phrase: list[str] = []
    opened = False  # whether the word before is a determiner or a modifier
    for word in _WORD.findall(caption.lower()):
        if word in _DETERMINERS or word.isdecimal():
            _close(phrase, found)
            opened = True
        elif word in _SMALL or not word[0].isalpha():
            _close(phrase, found)
            opened = False
        # behind a determiner or modifier such a word is an adjective: `a parked car`
        elif not opened and (word in _VERBS or _bent(word)):
            _close(phrase, found)
        else:
            phrase.append(word)
            opened = word in _MODIFIERS or _bent(word)
    _close(phrase, found)
    return list(found)


def _bent(word: str) -> bool:
    """Return whether a word may be a form of a verb, such as `parked` in `a car parked`."""
    return word.endswith(("ing", "ed")) and len(word) > 3 and word not in _NOUNS


def _close(phrase: list[str], found: dict[str, None]) -> None:
    if phrase:
        found[" ".join(phrase)] = None
        phrase.clear()


def without_determiners(phrase: str) -> str:
    """Return a parser's noun chunk in the form of `light_phrases`; a pronoun becomes empty."""
    words = _WORD.findall(phrase.lower())
    while words and (words[0] in _DETERMINERS or words[0].isdecimal()):
        words.pop(0)
    return "" if len(words) == 1 and words[0] in _SMALL else " ".join(words)


def has_spacy(model: str) -> bool:
    """Return whether spaCy and the given model of it are installed."""
    return all(name in sys.modules or find_spec(name) for name in ("spacy", model))


@cache
def _parser(model: str) -> Any:
    import spacy

    return spacy.load(model, exclude=["ner", "lemmatizer"])


def phrases_of(chunker: str, captions: Sequence[str]) -> Iterator[list[str]]:
    """Yield the phrases of each caption; `chunker` is `light` or the name of a spaCy model."""
    if chunker == LIGHT:
        yield from map(light_phrases, captions)
        return
    for parsed in _parser(chunker).pipe(captions):
        phrases = (without_determiners(chunk.text) for chunk in parsed.noun_chunks)
        yield list(dict.fromkeys(phrase for phrase in phrases if phrase))


def hash_phrase(phrase: str) -> int:
    """Return a 64-bit hash of a phrase. Two equal hashes among a million have a chance of 3e-8."""
    return int.from_bytes(
        blake2b(phrase.encode(errors="replace"), digest_size=8).digest(), "little"
    )


def hash_block(job: tuple[str, Sequence[str]]) -> tuple[bytes, bytes]:
    """Return the number of phrases of each caption (uint16) and all their hashes (uint64).

    Bytes and not lists, since they are sent between processes by the million.
    """
    counts, hashes = array("H"), array("Q")
    for phrases in phrases_of(*job):
        # the count has 16 bits; no caption comes near it
        few = phrases[:65535]
        counts.append(len(few))
        hashes.extend(map(hash_phrase, few))
    return counts.tobytes(), hashes.tobytes()


def name_block(job: tuple[str, Sequence[str]]) -> list[str]:
    """Return the distinct phrases of some captions."""
    return list(dict.fromkeys(p for phrases in phrases_of(*job) for p in phrases))


def blocks_of(captions: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield captions in lists of `size`; the last list may be shorter."""
    block: list[str] = []
    for caption in captions:
        block.append(caption)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
