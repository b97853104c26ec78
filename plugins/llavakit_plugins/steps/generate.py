"""Generates instruction-following data from captions and boxes (paper, section 3)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from llavakit import (
    Generator,
    ImageContext,
    InputPath,
    Options,
    Outcome,
    Run,
    Step,
    Stopped,
    Turn,
    Use,
    write_text,
)
from llavakit.contracts.data import IMAGE, RESPONSE_KINDS, ResponseKind
from llavakit.contracts.run import Planner, StepPlan
from llavakit.contracts.sections import Card, Gallery, Table
from llavakit_plugins.generation.contexts import Contexts
from llavakit_plugins.generation.items import choose
from llavakit_plugins.generation.requests.prompted import PromptedGenerator
from llavakit_plugins.generation.sources import open_sources

BRIEF = (
    "Describe the image briefly.",
    "What is shown here, in one sentence?",
    "Give a short caption for this image.",
    "Sum up the image.",
)
"""Questions of stage 1 for a small language model; `brief_questions` has all of them."""
_SHOWN = 9

Row = Mapping[str, Any]
"""A sample as LLaVA's JSON has it."""
Made = tuple[ImageContext, ResponseKind, Row]


class GenerateOptions(Options):
    contexts: InputPath
    """Captions and boxes: one JSON object a line, or COCO's `captions_*.json`."""
    instances: InputPath | None = None
    """COCO's `instances_*.json`, where `contexts` are COCO's captions."""
    held_out: InputPath | None = None
    """More of the same, whose data go into `held-out/` and are not learned from."""
    images: InputPath | None = None
    """The images' folder, for the report only: a generator never sees them."""
    generator: Use[Generator]
    kinds: tuple[ResponseKind, ...] = Field(default=RESPONSE_KINDS, min_length=1)
    counts: dict[ResponseKind, int] = Field(default_factory=dict)
    """How many contexts a kind takes, drawn at random; all where it is not named."""
    concurrency: int = Field(default=16, ge=1)
    """Requests to a chat model that are on their way at once."""
    attempts: int = Field(default=3, ge=1)
    """Replies that are asked for until one can be used."""
    budget_usd: float | None = Field(default=None, gt=0)
    """Most that the chat model may cost."""

    @field_validator("counts")
    @classmethod
    def _of_kinds(
        cls, counts: dict[ResponseKind, int], info: ValidationInfo
    ) -> dict[ResponseKind, int]:
        for kind in counts:
            if kind not in info.data.get("kinds", RESPONSE_KINDS):
                raise ValueError(f"`{kind}` is not among `kinds`; add it there or take it out here")
        return counts


class Generate(Step):
    """Leaves `captions.json` for stage 1, and `KIND.json` and `instruct.json` for stage 2."""

    name = "generate"
    Options = GenerateOptions

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options

    @classmethod
    def plan(cls, options: GenerateOptions, planner: Planner) -> StepPlan | None:
        generator = planner.build(options.generator)
        if not isinstance(generator, PromptedGenerator):
            return None
        from llavakit_plugins.generation.price import price_job

        return price_job(options, generator, planner.seed)

    def run(self, run: Run) -> Outcome:
        generator = run.build(self.options.generator)
        if isinstance(generator, PromptedGenerator):
            from llavakit_plugins.generation.job import run_job

            return run_job(self.options, generator, run)
        return self._at_once(generator, run)

    def _at_once(self, generator: Generator, run: Run) -> Outcome:
        """Write the data of a generator that needs no waiting, no retries and no money."""
        counts: dict[str, int] = {}
        shown: list[Card] = []
        with open_sources(self.options, run.directory) as sources:
            for name, contexts in sources.items():
                draw = np.random.default_rng(run.seed)
                captions = [caption_row(context, draw, BRIEF) for context in contexts]
                made = list(self._samples(generator, contexts, name, run))
                content = {"captions": captions, "instruct": [row for _, _, row in made]}
                for kind in self.options.kinds:
                    content[kind] = [row for _, own, row in made if own == kind]
                folder = run.directory / name
                folder.mkdir(exist_ok=True)
                for label, rows in content.items():
                    _write(folder / f"{label}.json", rows)
                    counts[f"{name}/{label}".lstrip("/")] = len(rows)
                shown = shown or _cards(run.directory, self.options, made)
        table = Table(
            title="Samples by file",
            columns=["file", "samples"],
            rows=[[name, count] for name, count in counts.items()],
        )
        metrics = {"samples": float(counts["instruct"])}
        return Outcome(metrics, [table, Gallery(title="What the teacher wrote", cards=shown)])

    def _samples(
        self, generator: Generator, contexts: Contexts, name: str, run: Run
    ) -> Iterator[Made]:
        """Yield every sample, in the order of the contexts."""
        counts = {} if name else self.options.counts
        chosen = choose(len(contexts), self.options.kinds, counts, run.seed)
        for index, context in enumerate(contexts):
            for kind in self.options.kinds:
                if chosen[kind][index]:
                    yield context, kind, row_of(context, kind, generator.generate(context, kind))
            if (index + 1) % 256 == 0 or index + 1 == len(contexts):
                if run.stopping():
                    raise Stopped
                run.progress(index + 1, len(contexts), f"generating {name}".strip())


def row_of(context: ImageContext, kind: str, turns: Sequence[Turn]) -> Row:
    """Return a sample as LLaVA's JSON has it."""
    conversations = [{"from": turn.role, "value": turn.text} for turn in turns]
    return {
        "id": f"{context.id}-{kind}",
        "image": context.image,
        "conversations": conversations,
    }


def caption_row(context: ImageContext, draw: np.random.Generator, questions: Sequence[str]) -> Row:
    """Return a sample of stage 1: a brief question and one of the captions."""
    question, answer = str(draw.choice(questions)), str(draw.choice(context.captions))
    turns = (Turn("human", f"{IMAGE}\n{question}"), Turn("gpt", answer))
    return row_of(context, "caption", turns)


def brief_questions() -> tuple[str, ...]:
    """Return the questions of stage 1: our own words for the paper's table 11."""
    text = files("llavakit_plugins.generation").joinpath("brief.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def find_image(images: Path | None, context: ImageContext) -> Path | None:
    """Return the file of a context's image, where there is one."""
    from llavakit import inside

    if images is None:
        return None
    found = inside(images, context.image, context.id)
    return found if found.is_file() else None


def _write(path: Path, rows: Sequence[Row]) -> None:
    write_text(path, json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n")


def _cards(folder: Path, options: GenerateOptions, made: Sequence[Made]) -> list[Card]:
    cards = []
    for number, kind in enumerate((*options.kinds,) * 3):
        own = [(context, row) for context, k, row in made if k == kind]
        if not own:
            continue
        context, row = own[number * max(1, len(own) // _SHOWN) % len(own)]
        lines = [("told", context.captions[0])]
        for turn in row["conversations"]:
            label = "question" if turn["from"] == "human" else kind
            lines.append((label, turn["value"].replace(IMAGE, "").strip()))
        image = find_image(options.images, context)
        shown = None if image is None else os.path.relpath(image, folder)
        cards.append(Card(image=shown, lines=lines))
    return cards
