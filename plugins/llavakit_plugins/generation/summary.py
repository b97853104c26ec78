"""Statistics of a job's replies: verdicts, lengths, and how questions begin."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llavakit.contracts.data import IMAGE
from llavakit.contracts.sections import Curves, Table
from llavakit_plugins.generation.items import Item

_FIRST_WORDS = 12  # bars of a chart of first words
_IN_REPORT = 6  # first words of each kind in the report
_BIN = 10  # words of an answer in one bin of the plot of lengths
_LONGEST = 400  # words; longer answers are counted in the last bin


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart."""

    name: str
    count: int
    share: float
    """Share of all, in percent."""
    share_of_most: float
    """Share of the longest bar, in percent."""


@dataclass(frozen=True)
class Bars:
    """A bar chart."""

    title: str
    rows: tuple[Bar, ...]
    caption: str


class Summary:
    """Counts of verdicts, lengths and first words."""

    def __init__(self) -> None:
        self.usable = self.rejected = self.unanswered = 0
        self._verdicts: Counter[tuple[str, str]] = Counter()
        self._notes: Counter[tuple[str, str]] = Counter()
        self._samples: Counter[str] = Counter()
        self._questions: dict[str, Counter[int]] = {}
        self._answers: dict[str, Counter[int]] = {}
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
        self._samples[item.kind] += 1
        for note in item.verdict.notes:
            self._notes["repaired", note] += 1
        for turn in item.verdict.turns:
            words = turn.text.replace(IMAGE, "").split()
            side = self._answers if turn.role == "gpt" else self._questions
            side.setdefault(item.kind, Counter())[len(words)] += 1
            if turn.role == "human":
                start = " ".join(words[:2]).lower().strip("?,.!")
                self._first.setdefault(item.kind, Counter())[start] += 1

    @property
    def kinds(self) -> list[str]:
        """The kinds of responses, sorted."""
        return sorted({kind for kind, _ in self._verdicts})

    def plots(self) -> list[Table | Curves]:
        """Return the tables of verdicts and reasons, and the plot of lengths."""
        outcomes = ("accepted", "repaired", "rejected", "unanswered")
        verdicts = Table(
            title="What became of the replies",
            columns=["kind", *outcomes],
            rows=[[kind, *(self._verdicts[kind, o] for o in outcomes)] for kind in self.kinds],
        )
        notes = Table(
            title="Repairs and rejections",
            columns=["what", "why", "replies"],
            rows=[[what, why, count] for (what, why), count in self._notes.most_common()],
            caption="Rejected replies are asked for again while there are attempts left.",
        )
        samples = Table(
            title="Samples",
            columns=["kind", "samples", "questions", "words a question", "words an answer"],
            rows=[
                [
                    kind,
                    self._samples[kind],
                    questions.total(),
                    round(_mean(questions), 1),
                    round(_mean(self._answers[kind]), 1),
                ]
                for kind, questions in sorted(self._questions.items())
            ],
        )
        lengths = Curves(
            title="Length of the answers",
            x=f"words, in steps of {_BIN}; the last: {_LONGEST} and more",
            y="share of the answers in %",
            series={kind: _histogram(found) for kind, found in sorted(self._answers.items())},
            log=False,
        )
        return [verdicts, samples, *([notes] if self._notes else []), lengths]

    def firsts(self) -> list[Bars]:
        """Return how the questions of each kind begin."""
        return [_bars(kind, found) for kind, found in sorted(self._first.items())]

    def sections(self) -> list[Table | Curves]:
        """Return the sections of the run's report."""
        firsts = {
            kind: found.most_common(_IN_REPORT) for kind, found in sorted(self._first.items())
        }
        questions = Table(
            title="How questions begin",
            columns=["kind", "first words", "questions", "share in %"],
            rows=[
                [kind, words, count, round(100 * count / self._first[kind].total(), 1)]
                for kind, found in firsts.items()
                for words, count in found
            ],
            caption="More in the step's review.html.",
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
        return [*self.plots(), ranks, questions]


def _bars(kind: str, found: Counter[str]) -> Bars:
    total, top = found.total(), found.most_common(_FIRST_WORDS)
    rows = [Bar(name, n, 100 * n / total, 100 * n / top[0][1]) for name, n in top]
    ways = "1 way" if len(found) == 1 else f"{len(found):,} ways"
    caption = f"The two first words of {total:,} questions, which begin in {ways}."
    return Bars(f"How questions begin: {kind}", tuple(rows), caption)


def _mean(counts: Counter[int]) -> float:
    return sum(length * count for length, count in counts.items()) / counts.total()


def _histogram(counts: Counter[int]) -> list[tuple[float, float]]:
    """Return the share of each bin of lengths in percent, also of empty bins in between."""
    bins: Counter[int] = Counter()
    for length, count in counts.items():
        bins[min(length, _LONGEST) // _BIN] += count
    first, last = min(bins), max(bins)
    return [
        (float(bin_index * _BIN), 100 * bins[bin_index] / counts.total())
        for bin_index in range(first, last + 1)
    ]
