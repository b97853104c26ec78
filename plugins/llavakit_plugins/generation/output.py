"""Writes a job's data: LLaVA's JSON in the order of the contexts, and the origin of each sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llavakit import Outcome, Run, explain_write, new_file
from llavakit_plugins.generation.contexts import Contexts
from llavakit_plugins.generation.items import Item, Items
from llavakit_plugins.generation.requests.ledger import Ledger
from llavakit_plugins.generation.review import Review
from llavakit_plugins.generation.rows import brief_questions, caption_row, row_of
from llavakit_plugins.generation.summary import Summary

_EVERY = 1000  # items between progress messages


class Write(Protocol):
    """Appends one row to a file."""

    def __call__(self, row: Mapping[str, Any]) -> None: ...


def write_output(
    jobs: Sequence[tuple[str, Contexts, Items]],
    ledger: Ledger,
    unanswered: Mapping[str, str],
    review: Review,
    run: Run,
) -> Outcome:
    """Write all files of the step; return its metrics and the report's sections.

    `unanswered` holds the reasons of requests without a reply, by key. Every file is written aside
    and renamed when it is complete.
    """
    summary = Summary()
    for name, contexts, items in jobs:
        folder = run.directory / name
        with explain_write(folder):
            folder.mkdir(exist_ok=True)
        with ExitStack() as stack:
            samples = {
                label: stack.enter_context(json_list(folder / f"{label}.json"))
                for label in ("instruct", *items.chosen)
            }
            origins, aside = (
                stack.enter_context(json_lines(folder / f"{label}.jsonl"))
                for label in ("provenance", "rejected")
            )
            # a second walk over the ledger, and not a list of items:
            # a job may have millions of them
            for number, item in enumerate(items.walk(ledger), start=1):
                if number % _EVERY == 0:
                    run.progress(number, len(items), f"writing {name}".strip())
                reason = unanswered.get(item.record.key, "") if item.open else ""
                summary.add(item, reason)
                review.see(item, reason)
                usable = item.verdict is not None and item.verdict.outcome != "rejected"
                if usable and item.verdict is not None:
                    row = row_of(item.context, item.kind, item.verdict.turns)
                    samples["instruct"](row)
                    samples[item.kind](row)
                    origins(_origin(item))
                else:
                    aside({**_origin(item), "unanswered": reason})
        # from the seed alone, so that stage 1's captions do not depend on which replies came
        draw = np.random.default_rng(run.seed)
        questions = brief_questions()
        with json_list(folder / "captions.json") as write:
            # from the first context on, though a share may begin later: each has its own draw
            for number, context in zip(range(items.share.stop), contexts, strict=False):
                row = caption_row(context, draw, questions)
                if number in items.share:
                    write(row)
    facts = [
        f"{summary.usable:,} samples of {sum(len(items) for _, _, items in jobs):,}",
        f"{len(ledger):,} replies",
        f"{ledger.input_tokens:,} tokens sent, {ledger.output_tokens:,} received",
        price_of(ledger),
        f"seed {run.seed}",
    ]
    review.write(run.directory / "review.html", summary, facts)
    metrics = {
        "samples": float(summary.usable),
        "rejected": float(summary.rejected),
        "unanswered": float(summary.unanswered),
        **({} if ledger.usd is None else {"usd": ledger.usd}),
        "input_tokens": float(ledger.input_tokens),
        "output_tokens": float(ledger.output_tokens),
    }
    return Outcome(metrics, [*summary.sections(), review.gallery(run.directory)])


def price_of(ledger: Ledger) -> str:
    """Return the cost of the replies in words."""
    return "price not known" if ledger.usd is None else f"{ledger.usd:,.2f} USD"


def _origin(item: Item) -> dict[str, Any]:
    verdict, entry = item.verdict, item.entry
    return {
        "id": f"{item.context.id}-{item.kind}",
        "context": item.context.id,
        "kind": item.kind,
        "verdict": None if verdict is None else verdict.outcome,
        "notes": [] if verdict is None else list(verdict.notes),
        "refused": list(item.refused),
        "draw": None if entry is None else entry.draw,
        "model": None if entry is None else entry.model,
        "prompt": item.record.prompt,
        "time": None if entry is None else entry.time,
        "input_tokens": None if entry is None else entry.input_tokens,
        "output_tokens": None if entry is None else entry.output_tokens,
        "usd": None if entry is None else entry.usd,
    }


@contextmanager
def json_list(path: Path) -> Iterator[Write]:
    """Yield a function that appends a row to a JSON list in a file, each on a line of its own.

    Rows are written one by one, because the list of a large job may not fit into memory.
    """
    with text_list(path) as write:
        yield lambda row: write(to_text(row))


@contextmanager
def text_list(path: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that appends a row to a JSON list as `json_list` does: the row's text."""
    count = 0
    with new_file(path) as file:

        def write(row: str) -> None:
            nonlocal count
            file.write(f"{',' if count else '['}\n {row}")
            count += 1

        yield write
        file.write("\n]\n" if count else "[]\n")


def to_text(row: Mapping[str, Any]) -> str:
    """Return a row as JSON in one line, in its own letters."""
    return json.dumps(row, ensure_ascii=False)


@contextmanager
def json_lines(path: Path) -> Iterator[Write]:
    """Yield a function that appends a row to a file as one line of JSON."""
    with new_file(path) as file:
        yield lambda row: print(to_text(row), file=file)
