"""Chooses stage-1 captions so that rare things are kept and frequent ones don't crowd them out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from llavakit import DataError, InputPath, Options, Outcome, Run, Step, Stopped, new_file
from llavakit.contracts.data import IMAGE
from llavakit.contracts.sections import Curves, Table
from llavakit_plugins.generation.curation.captions import CaptionRow, read_captions
from llavakit_plugins.generation.curation.concepts import (
    Choice,
    choose,
    find_phrases,
    name_phrases,
    ranks,
    worker_pool,
)
from llavakit_plugins.generation.curation.phrases import LIGHT, has_spacy, hash_phrase
from llavakit_plugins.generation.output import json_lines, json_list
from llavakit_plugins.generation.rows import brief_questions

_SHOWN = 15


class FilterOptions(Options):
    captions: InputPath
    """LLaVA's JSON, JSON lines with `caption`, or CC3M's tab-separated lines."""
    minimum: int = Field(default=3, ge=1)
    """Phrases in fewer captions are dropped."""
    most: int = Field(default=100, ge=1)
    """Captions that are taken for one phrase."""
    chunker: str = "auto"
    """`light`, or a model of spaCy; `auto` is en_core_web_sm where that is installed."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)


class Filter(Step):
    """Leaves `kept.jsonl`, `phrases.tsv`, and `captions.json` of the rows that have images."""

    name = "filter"
    Options = FilterOptions

    def __init__(self, options: FilterOptions) -> None:
        self.options = options

    def run(self, run: Run) -> Outcome:
        options = self.options
        chunker, said = _chunker(options.chunker)
        run.event("chunker", chunker=chunker, reason=said)

        def show(done: int) -> None:
            if run.stopping():
                raise Stopped
            run.progress(done, 0, "finding noun phrases")

        with worker_pool(options.workers) as pool:
            texts = (row.caption for row in read_captions(options.captions))
            # two passes over the file:
            # which captions are kept is known only when all phrases are counted
            postings = find_phrases(texts, chunker, pool, options.workers, show)
            if not postings.captions:
                raise DataError(f"{options.captions} holds no captions")
            choice = choose(postings, minimum=options.minimum, most=options.most, seed=run.seed)
            kept = _write_kept(options.captions, choice, run)
            names = _names(name_phrases(kept, chunker, pool, options.workers), choice, options)
        _write_phrases(run.directory / "phrases.tsv", names)
        big = choice.before_P >= options.minimum
        metrics = {
            "captions": float(postings.captions),
            "kept": float(choice.chosen_C.sum()),
            "phrases": float(len(choice.phrase_P)),
            "phrases_kept": float(big.sum()),
        }
        curves = Curves(
            title="Noun phrases before and after",
            x="phrases, from frequent to rare",
            y="captions with the phrase",
            series={"before": ranks(choice.before_P), "after": ranks(choice.after_P[big])},
            caption=f"As the paper's figure 7. {said}",
            log=True,
        )
        top = sorted(names, key=lambda item: (-item[1], item[0]))[:_SHOWN]
        table = Table(
            title="The most frequent phrases",
            columns=["phrase", "captions before", "captions after"],
            rows=[list(item) for item in top],
        )
        return Outcome(metrics, [curves, table])


def _chunker(wanted: str) -> tuple[str, str]:
    """Return the chunker and a sentence that says which it is and why."""
    if wanted == "auto":
        if has_spacy("en_core_web_sm"):
            return "en_core_web_sm", "Noun phrases are spaCy's (en_core_web_sm)."
        return LIGHT, (
            "Noun phrases are found by the built-in light chunker, since spaCy with en_core_web_sm "
            "is not installed: the paper used spaCy."
        )
    if wanted == LIGHT:
        return LIGHT, "Noun phrases are found by the built-in light chunker, as the recipe asks."
    if not has_spacy(wanted):
        raise DataError(
            f"the chunker `{wanted}` is not installed; `pip install spacy` and `python -m spacy "
            f"download {wanted}`, or choose `light`"
        )
    return wanted, f"Noun phrases are spaCy's ({wanted})."


def _write_kept(path: Path, choice: Choice, run: Run) -> Iterator[str]:
    """Write the chosen rows as they were, and as samples where they have an image; yield captions.

    The file, which may have millions of rows, is read once for this.
    """
    draw = np.random.default_rng(run.seed)
    questions = brief_questions()
    with (
        json_lines(run.directory / "kept.jsonl") as keep,
        json_list(run.directory / "captions.json") as train,
    ):
        for row, chosen in zip(read_captions(path), choice.chosen_C.tolist(), strict=True):
            if chosen:
                keep(row.row)
                if (sample := _sample(row, draw, questions)) is not None:
                    train(sample)
                yield row.caption


def _sample(
    row: CaptionRow, draw: np.random.Generator, questions: tuple[str, ...]
) -> dict[str, Any] | None:
    """Return a row as a sample of stage 1."""
    # the row is a sample already, and keeps the question it was published with
    if "conversations" in row.row:
        return row.row
    if "image" not in row.row:
        return None
    return {
        "id": str(row.row.get("id", row.row["image"])),
        "image": row.row["image"],
        "conversations": [
            {"from": "human", "value": f"{IMAGE}\n{questions[int(draw.integers(len(questions)))]}"},
            {"from": "gpt", "value": row.caption},
        ],
    }


def _names(phrases: Any, choice: Choice, options: FilterOptions) -> list[tuple[str, int, int]]:
    """Return (phrase, captions before, captions after) of every phrase that was not dropped."""
    found: dict[str, tuple[str, int, int]] = {}
    for phrase in phrases:
        if phrase in found:
            continue
        # the first pass keeps hashes of phrases, to save memory; their words are found again for
        # the kept captions alone
        index = int(np.searchsorted(choice.phrase_P, np.uint64(hash_phrase(phrase))))
        if choice.before_P[index] >= options.minimum:
            found[phrase] = (phrase, int(choice.before_P[index]), int(choice.after_P[index]))
    return list(found.values())


def _write_phrases(path: Path, names: list[tuple[str, int, int]]) -> None:
    with new_file(path) as file:
        file.write("phrase\tbefore\tafter\n")
        for phrase, before, after in sorted(names, key=lambda item: (item[1], item[0])):
            file.write(f"{phrase}\t{before}\t{after}\n")
