"""Compares groups of runs: as numbers, and as text, CSV, JSON and sections of a page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llavakit import finite
from llavakit.contracts.errors import RecipeError
from llavakit.contracts.sections import Table
from llavakit_plugins.comparing.runs import Group, group_runs, read_runs
from llavakit_plugins.reporting.plain import aligned

_NOISE = 2.0  # standard errors of a difference


@dataclass(frozen=True)
class Cell:
    """A metric over the seeds of a group."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """The sample's standard deviation; None for a single run, NaN where a value is NaN."""
        if not all(map(math.isfinite, self.values)):
            return math.nan if len(self.values) > 1 else None
        # of a sample: few seeds stand for all
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float | None:
        """The standard error of the mean."""
        return None if self.std is None else self.std / math.sqrt(len(self.values))

    def __str__(self) -> str:
        digits = 1 if abs(self.mean) >= 10 else 3  # percent, or losses and shares
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Pair:
    """Two recipes in the order of the paper, the better one first."""

    better: str
    worse: str
    published: tuple[float, float]
    ours: tuple[float, float]
    clear: bool | None
    """Whether ours differ by more than twice the standard error; None where that is unknown."""

    @property
    def agrees(self) -> bool:
        return self.ours[0] > self.ours[1]

    def __str__(self) -> str:
        sign = ">" if self.agrees else "<" if self.ours[0] < self.ours[1] else "="
        noise = {True: "", False: ", within the noise", None: ", one seed"}[self.clear]
        return (
            f"{self.better} {sign} {self.worse} (ours {self.ours[0]:.4g} {sign} {self.ours[1]:.4g}"
            f"{noise}; paper {self.published[0]:g} > {self.published[1]:g})"
        )


@dataclass(frozen=True)
class Order:
    """How the recipes of one table of the paper are ordered by a metric."""

    table: str
    metric: str
    pairs: tuple[Pair, ...]

    @property
    def agreeing(self) -> int:
        return sum(pair.agrees for pair in self.pairs)

    def __str__(self) -> str:
        return (
            f"{self.table}, {self.metric}: {self.agreeing} of {len(self.pairs)} pairs are ordered "
            "as in the paper"
        )


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, the metrics to show, and what was left out."""

    groups: Sequence[Group]
    metrics: Sequence[str]
    left_out: Sequence[str]
    notes: Sequence[str] = ()
    """What is to be known of the metrics that are shown."""

    def cell(self, group: Group, metric: str) -> Cell | None:
        """Return a metric over the seeds, or None where no run of the group has it."""
        values = group.values(metric)
        return Cell(tuple(values)) if values else None

    @property
    def orders(self) -> list[Order]:
        """How the paper orders the recipes, pair by pair, and how ours are."""
        tables = dict.fromkeys(
            (item.table, metric)
            for group in self.groups
            for metric in self.metrics
            if (item := group.published(metric)) is not None
        )
        found = (Order(*table, tuple(self._pairs(*table))) for table in tables)
        return [order for order in found if order.pairs]

    def _pairs(self, table: str, metric: str) -> Iterator[Pair]:
        members = [
            (group.name, item.value, cell)
            for group in self.groups
            if (item := group.published(metric)) is not None
            and item.table == table
            and (cell := self.cell(group, metric)) is not None
        ]
        for pair in combinations(sorted(members, key=lambda member: -member[1]), 2):
            (better, high, ours), (worse, low, theirs) = pair
            if high == low:
                continue
            clear = None
            if ours.error is not None and theirs.error is not None:
                # errors of independent runs add as squares
                noise = math.hypot(ours.error, theirs.error)
                clear = abs(ours.mean - theirs.mean) > _NOISE * noise
            yield Pair(better, worse, (high, low), (ours.mean, theirs.mean), clear)

    # -- ways to show it ---------------------------------------------------------------------------

    def table(self) -> Table:
        """Return the comparison as one table, the paper's value beside ours where it has one."""
        columns = ["recipe", "seeds"]
        for metric in self.metrics:
            columns += [metric, *(["paper"] if self._in_paper(metric) else [])]
        rows: list[list[str | float | int | None]] = []
        for group in self.groups:
            row: list[str | float | int | None] = [group.name, len(group.runs)]
            for metric in self.metrics:
                cell = self.cell(group, metric)
                row.append(None if cell is None else str(cell))
                if self._in_paper(metric):
                    item = group.published(metric)
                    row.append(None if item is None else item.value)
            rows.append(row)
        caption = "Mean ± standard deviation over seeds."
        return Table(title="Runs by recipe", columns=columns, rows=rows, caption=caption)

    def order_table(self) -> Table:
        """Return the pairs that the paper orders, and whether ours are ordered the same."""
        rows: list[list[str | float | int | None]] = [
            [order.table, order.metric, pair.better, pair.worse, *pair.published, *pair.ours,
             "yes" if pair.agrees else "no",
             {True: "yes", False: "within the noise", None: "one seed"}[pair.clear]]
            for order in self.orders
            for pair in order.pairs
        ]  # fmt: skip
        columns = ["table", "metric", "better", "worse", "paper", "paper", "ours", "ours"]
        return Table(
            title="Is the order the paper's?",
            columns=[*columns, "agrees", "clear"],
            rows=rows,
            caption="Clear: ours differ by more than two standard errors.",
        )

    def _in_paper(self, metric: str) -> bool:
        return any(group.published(metric) for group in self.groups)

    def text(self) -> str:
        """Return the table, the orders and what was left out, for a terminal."""
        table = self.table()
        rows = [table.columns, *([_plain(cell) for cell in row] for row in table.rows)]
        rules = ["-" * max(map(len, column)) for column in zip(*rows, strict=True)]
        right = [index > 0 for index in range(len(rules))]
        lines = aligned([rows[0], rules, *rows[1:]], right)
        for order in self.orders:
            lines += ["", f"{order}:" if order.agreeing < len(order.pairs) else f"{order}."]
            lines += [f"  not: {pair}" for pair in order.pairs if not pair.agrees]
        if self.notes:
            lines += ["", *(f"note: {sentence}" for sentence in self.notes)]
        if self.left_out:
            lines += ["", *(f"left out: {sentence}" for sentence in self.left_out)]
        return "\n".join(lines)

    def csv(self) -> str:
        """Return one row a recipe: mean, standard deviation, runs and paper's value by metric."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        kinds = ("mean", "std", "runs", "paper")
        writer.writerow(
            ["recipe", "seeds", *(f"{metric} {kind}" for metric in self.metrics for kind in kinds)]
        )
        for group in self.groups:
            row: list[Any] = [group.name, " ".join(str(run.seed) for run in group.runs)]
            for metric in self.metrics:
                cell, item = self.cell(group, metric), group.published(metric)
                row += [None] * 3 if cell is None else [cell.mean, cell.std, len(cell.values)]
                row.append(None if item is None else item.value)
            writer.writerow(row)
        return buffer.getvalue()

    def json(self) -> str:
        """Return everything as JSON."""
        groups = [
            {
                "recipe": group.name,
                "runs": [{"folder": str(run.folder), "seed": run.seed} for run in group.runs],
                "metrics": {
                    metric: {"mean": cell.mean, "std": cell.std, "values": list(cell.values)}
                    for metric in self.metrics
                    if (cell := self.cell(group, metric)) is not None
                },
                "paper": {
                    metric: {"table": item.table, "value": item.value}
                    for metric in self.metrics
                    if (item := group.published(metric)) is not None
                },
            }
            for group in self.groups
        ]
        orders = [
            {
                "table": order.table,
                "metric": order.metric,
                "agreeing": order.agreeing,
                "pairs": [
                    {
                        "better": pair.better,
                        "worse": pair.worse,
                        "paper": list(pair.published),
                        "ours": list(pair.ours),
                        "agrees": pair.agrees,
                        "clear": pair.clear,
                    }
                    for pair in order.pairs
                ],
            }
            for order in self.orders
        ]
        whole = {
            "groups": groups,
            "orders": orders,
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }
        return json.dumps(finite(whole), indent=2, allow_nan=False)


def _plain(cell: str | float | int | None) -> str:
    return "–" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell)


def compare(folders: Sequence[Path], wanted: Sequence[str] = ()) -> Comparison:
    """Compare the runs in these folders.

    `wanted` are metrics, as `evaluate.*`; by default those of evaluations, or where nothing was
    evaluated those of the last step that all recipes have (of each recipe's own last step where
    they have none in common). Raises RecipeError where there is no finished run, or none has such
    a metric.
    """
    runs, problems = read_runs(folders)
    if not runs:
        raise RecipeError("\n".join(["there is no finished run to compare", *problems]))
    groups, repeated = group_runs(runs)
    left_out = [*problems, *repeated]
    known = list(dict.fromkeys(metric for run in runs for metric in run.metrics))
    if wanted:
        metrics = [m for m in known if any(fnmatchcase(m, pattern) for pattern in wanted)]
        if not metrics:
            there = ", ".join(known) or "none"
            raise RecipeError(f"no run has a metric like {', '.join(wanted)}; there are: {there}")
        return Comparison(groups, metrics, left_out)
    # what is compared is what was tested, not losses
    metrics, notes = [m for m in known if _step(m).endswith("evaluate")], []
    if not metrics:
        steps, sentence = _last_steps(groups)
        metrics = [m for m in known if _step(m) in steps]
        notes += [sentence] if len(metrics) < len(known) else []
    empty = [group.name for group in groups if not any(map(group.values, metrics))]
    if metrics and empty:
        notes.append(f"nothing that is shown was measured by {', '.join(empty)}")
    if notes and (others := [m for m in known if m not in metrics]):
        notes.append(f"--metric NAME shows others; there are: {', '.join(others)}")
    return Comparison(groups, metrics, left_out, notes)


def _step(metric: str) -> str:
    return metric.partition(".")[0]


def _last_steps(groups: Sequence[Group]) -> tuple[set[str], str]:
    """Return the last step that all groups have, or else each one's own, and a sentence on it."""
    steps = [dict.fromkeys(_step(m) for run in group.runs for m in run.metrics) for group in groups]
    steps = [found for found in steps if found]  # one that measured nothing has no say
    common = [step for step in (steps[0] if steps else ()) if all(step in s for s in steps)]
    if common:
        return {common[-1]}, f"`{common[-1]}` is shown, the last step that all recipes have"
    return {[*found][-1] for found in steps}, "no step is in all recipes: the last of each is shown"
