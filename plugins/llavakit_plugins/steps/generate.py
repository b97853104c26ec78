"""Generates instruction-following data from captions and boxes (paper, section 3)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from llavakit import Generator, ImageContext, InputPath, Options, Outcome, Run, Step, Turn, Use
from llavakit.files import write_text
from llavakit.planning import Planner, StepPlan
from llavakit.reporting import Card, Gallery, Table
from llavakit.samples import IMAGE, RESPONSE_KINDS, ResponseKind
from llavakit_plugins.chat.prompted import PromptedGenerator
from llavakit_plugins.contexts import read_contexts

BRIEF = (
    "Describe the image briefly.",
    "What is shown here, in one sentence?",
    "Give a short caption for this image.",
    "Sum up the image.",
)
"""Questions of stage 1 for a small language model; `brief_questions` has all of them."""
_SHOWN = 9


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
        from llavakit_plugins.steps.generation.price import price_job

        return price_job(options, generator)

    def run(self, run: Run) -> Outcome:
        generator = run.build(self.options.generator)
        if isinstance(generator, PromptedGenerator):
            from llavakit_plugins.steps.generation.job import run_job

            return run_job(self.options, generator, run)
        counts: dict[str, int] = {}
        shown: list[Card] = []
        sources = {"": self.options.contexts, "held-out": self.options.held_out}
        for name, path in sources.items():
            if path is None:
                continue
            contexts = list(read_contexts(path))
            rows: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in self.options.kinds}
            for number, context in enumerate(contexts, start=1):
                for kind in self.options.kinds:
                    rows[kind].append(row_of(context, kind, generator.generate(context, kind)))
                if number % 256 == 0 or number == len(contexts):
                    run.progress(number, len(contexts), f"generating {name}".strip())
            draw = np.random.default_rng(run.seed)
            captions = [caption_row(context, draw, BRIEF) for context in contexts]
            folder = run.directory / name
            folder.mkdir(exist_ok=True)
            mixed = [row for together in zip(*rows.values(), strict=True) for row in together]
            for label, content in {"captions": captions, "instruct": mixed, **rows}.items():
                _write(folder / f"{label}.json", content)
                counts[f"{name}/{label}".lstrip("/")] = len(content)
            shown = shown or _cards(run.directory, self.options, contexts, rows)
        table = Table(
            title="Samples by file",
            columns=["file", "samples"],
            rows=[[name, count] for name, count in counts.items()],
        )
        metrics = {"samples": float(counts["instruct"])}
        return Outcome(metrics, [table, Gallery(title="What the teacher wrote", cards=shown)])


def row_of(context: ImageContext, kind: str, turns: Sequence[Turn]) -> Mapping[str, Any]:
    """Return a sample as LLaVA's JSON has it."""
    conversations = [{"from": turn.role, "value": turn.text} for turn in turns]
    return {
        "id": f"{context.id}-{kind}",
        "image": context.image,
        "conversations": conversations,
    }


def caption_row(
    context: ImageContext, draw: np.random.Generator, questions: Sequence[str]
) -> Mapping[str, Any]:
    """Return a sample of stage 1: a brief question and one of the captions."""
    question, answer = str(draw.choice(questions)), str(draw.choice(context.captions))
    turns = (Turn("human", f"{IMAGE}\n{question}"), Turn("gpt", answer))
    return row_of(context, "caption", turns)


def brief_questions() -> tuple[str, ...]:
    """Return the questions of stage 1: our own words for the paper's table 11."""
    text = files("llavakit_plugins").joinpath("brief.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def find_image(images: Path | None, context: ImageContext) -> Path | None:
    """Return the file of a context's image, where there is one."""
    from llavakit.images import inside

    if images is None:
        return None
    found = inside(images, context.image, context.id)
    return found if found.is_file() else None


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n")


def _cards(
    folder: Path,
    options: GenerateOptions,
    contexts: Sequence[ImageContext],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Card]:
    cards = []
    for number, kind in enumerate((*options.kinds,) * 3):
        index = number * max(1, len(contexts) // _SHOWN) % len(contexts)
        lines = [("told", contexts[index].captions[0])]
        for turn in rows[kind][index]["conversations"]:
            label = "question" if turn["from"] == "human" else kind
            lines.append((label, turn["value"].replace(IMAGE, "").strip()))
        image = find_image(options.images, contexts[index])
        shown = None if image is None else os.path.relpath(image, folder)
        cards.append(Card(image=shown, lines=lines))
    return cards
