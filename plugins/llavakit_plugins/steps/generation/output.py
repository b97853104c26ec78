"""Writes a job's data: LLaVA's JSON in the order of the contexts, and where each sample is from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llavakit import Outcome, Run
from llavakit.files import new_file
from llavakit.reporting import Curves, Table
from llavakit.samples import IMAGE
from llavakit_plugins.chat.ledger import Ledger
from llavakit_plugins.contexts import Contexts
from llavakit_plugins.steps.generate import brief_questions, caption_row, row_of
from llavakit_plugins.steps.generation.items import Item, Items
from llavakit_plugins.steps.generation.review import Review

_FIRST_WORDS = 12
_BIN = 10  # words of an answer, in the plot of lengths
_LONGEST = 400


class Write(Protocol):
    def __call__(self, row: Mapping[str, Any]) -> None: ...


def write_output(
    jobs: Sequence[tuple[str, Contexts, Items]],
    ledger: Ledger,
    unanswered: Mapping[str, str],
    review: Review,
    run: Run,
) -> Outcome:
    """Write every file of the step; return its numbers and sections."""
    summary = Summary()
    review.sample(sum(len(items) for _, _, items in jobs), run.seed)
    for name, contexts, items in jobs:
        folder = run.directory / name
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
            for item in items.walk(ledger):
                reason = unanswered.get(item.asked.key, "") if item.open else ""
                summary.add(item, reason)
                review.see(item)
                usable = item.verdict is not None and item.verdict.outcome != "rejected"
                if usable and item.verdict is not None:
                    row = row_of(item.context, item.kind, item.verdict.turns)
                    samples["instruct"](row)
                    samples[item.kind](row)
                    origins(_origin(item))
                else:
                    aside({**_origin(item), "unanswered": reason})
        draw = np.random.default_rng(run.seed)
        questions = brief_questions()
        with json_list(folder / "captions.json") as write:
            for context in contexts:
                write(caption_row(context, draw, questions))
        contexts.close()
    review.write(run.directory / "review.html", summary.sections(), run.seed)
    metrics = {
        "samples": float(summary.usable),
        "rejected": float(summary.rejected),
        "unanswered": float(summary.unanswered),
        "usd": ledger.spent,
        "input_tokens": float(ledger.input_tokens),
        "output_tokens": float(ledger.output_tokens),
    }
    return Outcome(metrics, [*summary.sections(), review.gallery(run.directory)])


class Summary:
    """Counts of verdicts, lengths and first words."""

    def __init__(self) -> None:
        self.usable = self.rejected = self.unanswered = 0
        self._verdicts: Counter[tuple[str, str]] = Counter()
        self._notes: Counter[tuple[str, str]] = Counter()
        self._words: dict[str, Counter[int]] = {}
        self._first: dict[str, Counter[str]] = {}

    def add(self, item: Item, unanswered: str) -> None:
        """Count one item."""
        for reason in item.refused:
            self._notes["rejected", reason] += 1
        if item.verdict is None or item.open:
            self.unanswered += 1
            self._verdicts[item.kind, "unanswered"] += 1
            self._notes["unanswered", unanswered or "not asked"] += 1
            return
        self._verdicts[item.kind, item.verdict.outcome] += 1
        if item.verdict.outcome == "rejected":
            self.rejected += 1
            return
        self.usable += 1
        for note in item.verdict.notes:
            self._notes["repaired", note] += 1
        for turn in item.verdict.turns:
            words = turn.text.replace(IMAGE, "").split()
            if turn.role == "gpt":
                lengths = self._words.setdefault(item.kind, Counter())
                lengths[min(len(words), _LONGEST) // _BIN * _BIN] += 1
            else:
                start = " ".join(words[:2]).lower().strip("?,.!")
                self._first.setdefault(item.kind, Counter())[start] += 1

    def sections(self) -> list[Table | Curves]:
        """Return what the report and the review page show."""
        outcomes = ("accepted", "repaired", "rejected", "unanswered")
        kinds = sorted({kind for kind, _ in self._verdicts})
        verdicts = Table(
            title="What became of the replies",
            columns=["kind", *outcomes],
            rows=[[kind, *(self._verdicts[kind, o] for o in outcomes)] for kind in kinds],
        )
        notes = Table(
            title="Repairs and rejections",
            columns=["what", "why", "replies"],
            rows=[[what, why, count] for (what, why), count in self._notes.most_common()],
            caption="Rejected replies are asked for again while there are attempts left.",
        )
        lengths = Curves(
            title="Length of the answers",
            x="words",
            y="answers",
            series={
                kind: [(float(at), float(count)) for at, count in sorted(found.items())]
                for kind, found in sorted(self._words.items())
            },
            log=False,
        )
        firsts = {
            kind: found.most_common(_FIRST_WORDS) for kind, found in sorted(self._first.items())
        }
        questions = Table(
            title="How questions begin",
            columns=["kind", "first words", "questions", "share in %"],
            rows=[
                [kind, words, count, round(100 * count / self._first[kind].total(), 1)]
                for kind, found in firsts.items()
                for words, count in found
            ],
        )
        ranks = Curves(
            title="Variety of the questions",
            x="first words, from frequent to rare",
            y="questions",
            series={
                kind: [
                    (float(rank), float(count))
                    for rank, (_, count) in enumerate(found.most_common(200), start=1)
                ]
                for kind, found in sorted(self._first.items())
            },
        )
        return [verdicts, notes, lengths, ranks, questions]


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
        "prompt": item.asked.prompt,
        "time": None if entry is None else entry.time,
        "input_tokens": None if entry is None else entry.input_tokens,
        "output_tokens": None if entry is None else entry.output_tokens,
        "usd": None if entry is None else entry.usd,
    }


@contextmanager
def json_list(path: Path) -> Iterator[Write]:
    """Yield a function that appends to a list in a JSON file, written as `indent=1` writes it."""
    count = 0
    with new_file(path) as file:

        def write(row: Mapping[str, Any]) -> None:
            nonlocal count
            text = json.dumps(row, ensure_ascii=False, indent=1).replace("\n", "\n ")
            file.write(f"{',' if count else '['}\n {_storable(text)}")
            count += 1

        yield write
        file.write("\n]\n" if count else "[]\n")


@contextmanager
def json_lines(path: Path) -> Iterator[Write]:
    """Yield a function that appends a line to a file."""
    with new_file(path) as file:
        yield lambda row: print(_storable(json.dumps(row, ensure_ascii=False)), file=file)


def _storable(text: str) -> str:
    """Return JSON in which a lone surrogate, which UTF-8 has no place for, is an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
