"""Generates instruction-following data from captions and boxes (paper, section 3)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from llavakit import Generator, ImageContext, InputPath, Options, Outcome, Run, Step, Turn, Use
from llavakit.files import write_text
from llavakit.reporting import Card, Gallery, Table
from llavakit.samples import IMAGE, RESPONSE_KINDS, ResponseKind
from llavakit_plugins.contexts import read_contexts

BRIEF = (
    "Describe the image briefly.",
    "What is shown here, in one sentence?",
    "Give a short caption for this image.",
    "Sum up the image.",
)
"""Questions of stage 1, our own words for the paper's table 11."""
_SHOWN = 9


class GenerateOptions(Options):
    contexts: InputPath
    """Captions and boxes, one JSON object a line."""
    held_out: InputPath | None = None
    """More of the same, whose data go into `held-out/` and are not learned from."""
    images: InputPath | None = None
    """The images' folder, for the report only: a generator never sees them."""
    generator: Use[Generator]
    kinds: tuple[ResponseKind, ...] = Field(default=RESPONSE_KINDS, min_length=1)


class Generate(Step):
    """Leaves `captions.json` for stage 1, and `KIND.json` and `instruct.json` for stage 2."""

    name = "generate"
    Options = GenerateOptions

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options

    def run(self, run: Run) -> Outcome:
        generator = run.build(self.options.generator)
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
                    rows[kind].append(_row(context, kind, generator.generate(context, kind)))
                if number % 256 == 0 or number == len(contexts):
                    run.progress(number, len(contexts), f"generating {name}".strip())
            draw = np.random.default_rng(run.seed)
            captions = [_caption(context, draw) for context in contexts]
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


def _row(context: ImageContext, kind: str, turns: Sequence[Turn]) -> Mapping[str, Any]:
    conversations = [{"from": turn.role, "value": turn.text} for turn in turns]
    return {
        "id": f"{context.id}-{kind}",
        "image": context.image,
        "conversations": conversations,
    }


def _caption(context: ImageContext, draw: np.random.Generator) -> Mapping[str, Any]:
    """Return a sample of stage 1: a brief question and one of the captions."""
    question, answer = str(draw.choice(BRIEF)), str(draw.choice(context.captions))
    turns = (Turn("human", f"{IMAGE}\n{question}"), Turn("gpt", answer))
    return _row(context, "caption", turns)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n")


def _cards(
    folder: Path,
    options: GenerateOptions,
    contexts: Sequence[ImageContext],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Card]:
    from llavakit.images import inside

    cards = []
    for number, kind in enumerate((*options.kinds,) * 3):
        index = number * max(1, len(contexts) // _SHOWN) % len(contexts)
        lines = [("told", contexts[index].captions[0])]
        for turn in rows[kind][index]["conversations"]:
            label = "question" if turn["from"] == "human" else kind
            lines.append((label, turn["value"].replace(IMAGE, "").strip()))
        image = None
        if options.images is not None:
            found = inside(options.images, contexts[index].image, contexts[index].id)
            image = os.path.relpath(found, folder) if found.is_file() else None
        cards.append(Card(image=image, lines=lines))
    return cards
