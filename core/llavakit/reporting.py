"""report.html and report.md: what a run did and what came of it, in one file each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from llavakit.files import write_text

if TYPE_CHECKING:
    from jinja2 import Template

    from llavakit.charts import Chart
    from llavakit.pictures import Pictures
    from llavakit.recipe import Recipe


class Curves(BaseModel):
    """Lines over a common axis."""

    kind: Literal["curves"] = "curves"
    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    caption: str = ""
    log: bool | None = None
    """Whether the y axis is logarithmic; None: where that reads better."""


class Table(BaseModel):
    """Rows of text and numbers under a head."""

    kind: Literal["table"] = "table"
    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]
    caption: str = ""


class Card(BaseModel):
    """One image with what was asked, answered and true."""

    image: str | None = None
    """Path of an image file, relative to the step's folder."""
    lines: list[tuple[str, str]]
    """(label, text), for example ("question", "Which digit is on the left?")."""
    right: bool | None = None


class Gallery(BaseModel):
    """A grid of cards."""

    kind: Literal["gallery"] = "gallery"
    title: str
    cards: list[Card]
    caption: str = ""


Section = Curves | Table | Gallery


class StepRecord(BaseModel):
    """What a finished step said."""

    name: str
    folder: Path
    record: dict[str, Any]
    seconds: float
    metrics: dict[str, float]
    sections: list[Section]


def write_report(recipe: Recipe, directory: Path, records: Sequence[StepRecord]) -> None:
    """Write report.html and report.md of the steps that are done.

    Raises LlavaError where they cannot be written. An image that is missing, damaged or outside of
    `directory` leaves a note in its place.
    """
    from llavakit.pictures import Pictures

    report = _collect(recipe, directory, records)
    pictures = Pictures(directory)
    write_text(directory / "report.html", _template().render(report=report, pictures=pictures))
    write_text(directory / "report.md", "\n".join(_markdown(report, pictures)) + "\n")


# -- what is shown ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    name: str
    use: str
    parameters: int | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class _Stage:
    name: str
    anchor: str
    seconds: float | None = None
    """None: not yet run."""
    share: float = 0.0
    """Of the longest step's time, in percent."""
    folder: Path = Path()
    options: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class _Report:
    name: str
    facts: Sequence[str]
    stages: Sequence[_Stage]
    parts: Sequence[_Part]
    environment: Mapping[str, Any]
    recipe: str


def _collect(recipe: Recipe, directory: Path, records: Sequence[StepRecord]) -> _Report:
    from llavakit.progress import duration

    uses = dict(recipe.active_steps())
    longest = max((record.seconds for record in records), default=0.0) or 1.0
    stages = [
        _Stage(
            name=record.name,
            anchor=f"step-{number}",
            seconds=record.seconds,
            share=100 * record.seconds / longest,
            folder=record.folder,
            options=_flat(uses[record.name].options) if record.name in uses else {},
            metrics=record.metrics,
            sections=record.sections,
        )
        for number, record in enumerate(records, start=1)
    ]
    done = {record.name for record in records}
    stages += [_Stage(name, "") for name in uses if name not in done]

    environment = _read_json(directory / "environment.json")
    plan = _flat(_read_json(directory / "plan.json"))
    parts = [
        _Part(name, use.use, plan.get(f"parts.{name}.parameters"), _flat(use.options))
        for name in type(recipe.model).model_fields
        if (use := getattr(recipe.model, name)) is not None
    ]
    device = environment.get("device_name", environment.get("device"))
    facts = [
        f"seed {recipe.seed}",
        *([str(device)] if device else []),
        f"{len(records)} of {len(stages)} steps done",
        duration(sum(record.seconds for record in records)),
    ]
    try:
        text = (directory / "recipe.toml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return _Report(recipe.name, facts, stages, parts, _flat(environment), text.strip())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        items = dict(enumerate(value, 1)) if _holds_tables(value) else value
        if isinstance(items, Mapping):
            flat |= _flat({str(k): v for k, v in items.items()}, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _holds_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def show(value: object) -> str:
    """Return a value as people read it."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        case int() | float() if value == int(value) and abs(value) < 1e15:
            return f"{int(value):,}" if abs(value) >= 10_000 else f"{int(value)}"
        case float():
            return f"{value:,.1f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(show, value))
    return str(value)


def words(name: str) -> str:
    """Return a name without its underscores."""
    return name.replace("_", " ")


def _cells(table: Table) -> tuple[list[bool], list[list[str]]]:
    """Return which columns are of numbers, and every cell as text, a column's alike in digits."""
    width = max(len(table.columns), *(len(row) for row in table.rows), 0)
    columns = [[row[i] for row in table.rows if i < len(row)] for i in range(width)]
    shown = [_column(column) for column in columns]
    kinds = [{type(cell) for cell in column} - {type(None)} for column in columns]
    numeric = [bool(kind) and kind <= {int, float} for kind in kinds]
    texts = [iter(column) for column in shown]
    return numeric, [[next(texts[i]) for i in range(len(row))] for row in table.rows]


def _column(cells: Sequence[str | float | int | None]) -> list[str]:
    floats = [cell for cell in cells if isinstance(cell, float) and math.isfinite(cell)]
    plain = all(cell == 0 or 1e-3 <= abs(cell) < 1000 for cell in floats)
    digits = max((len(show(cell).partition(".")[2]) for cell in floats), default=0)
    return [
        f"{cell:.{digits}f}"
        if plain and isinstance(cell, float) and math.isfinite(cell)
        else show(cell)
        for cell in cells
    ]


def _verdict(gallery: Gallery) -> tuple[int, int]:
    """Return how many cards are right, and how many are right or wrong."""
    judged = [card.right for card in gallery.cards if card.right is not None]
    return sum(judged), len(judged)


# -- HTML ------------------------------------------------------------------------------------------


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from llavakit.progress import duration

    loader = PackageLoader("llavakit", "")
    page = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, _, _ = loader.get_source(page, "report.css")
    page.globals["style"] = Markup(style)
    page.filters |= {
        "cells": _cells,
        "chart": _chart,
        "duration": duration,
        "show": show,
        "verdict": _verdict,
        "words": words,
    }
    return page.get_template("report.html.jinja")


def _chart(curves: Curves) -> Chart:
    from llavakit.charts import draw_lines

    return draw_lines(curves.series, title=curves.title, x=curves.x, y=curves.y, log=curves.log)


# -- Markdown --------------------------------------------------------------------------------------


def _markdown(report: _Report, pictures: Pictures) -> Iterator[str]:
    from llavakit.markdown import code, escape, table
    from llavakit.progress import duration

    yield f"# {escape(report.name)}\n\n{escape(' · '.join(report.facts))}\n\n## Steps\n"
    yield from table(
        ["Step", "Time", "Result"],
        [
            [
                escape(stage.name),
                "not yet run" if stage.seconds is None else duration(stage.seconds),
                escape(words(_pairs(stage.metrics))),
            ]
            for stage in report.stages
        ],
    )
    yield "\n## Model\n"
    yield from table(
        ["Part", "Component", "Parameters", "Options"],
        [
            [part.name, escape(part.use), show(part.parameters), escape(_pairs(part.options))]
            for part in report.parts
        ],
    )
    for stage in report.stages:
        if stage.seconds is None:
            continue
        yield f"\n## {escape(stage.name)}\n\n{duration(stage.seconds)}\n"
        metrics = [[escape(words(name)), show(value)] for name, value in stage.metrics.items()]
        if metrics:
            yield from table(["Metric", "Value"], metrics, [False, True])
        if stage.options:
            yield f"\nOptions: {escape(_pairs(stage.options))}"
        for section in stage.sections:
            yield f"\n### {escape(section.title)}\n"
            if caption := escape(section.caption):
                yield f"*{caption}*\n"
            yield from _markdown_section(section, stage.folder, pictures)
    yield "\n## Environment\n"
    facts = [[escape(name), escape(show(value))] for name, value in report.environment.items()]
    yield from table(["Name", "Value"], facts)
    yield f"\n## Recipe\n\n{code(report.recipe, 'toml')}"


def _markdown_section(section: Section, folder: Path, pictures: Pictures) -> Iterator[str]:
    from llavakit.markdown import escape, table

    match section:
        case Table():
            numeric, cells = _cells(section)
            rows = [[escape(cell) for cell in row] for row in cells]
            yield from table([escape(column) for column in section.columns], rows, numeric)
        case Curves():
            head = [f"{section.y} over {section.x}", "points", "first", "last", "lowest", "highest"]
            extents = section.series.items()
            rows = [[escape(name), *map(show, _extent(points))] for name, points in extents]
            yield from table([*map(escape, head)], rows, [False, *[True] * 5])
        case Gallery():
            right, judged = _verdict(section)
            if judged:
                yield f"{right} of {judged} right\n"
            labels = list(dict.fromkeys(label for card in section.cards for label, _ in card.lines))
            rows = []
            for card in section.cards:
                link = pictures.link(folder, card.image)
                said = ["; ".join(t for own, t in card.lines if own == label) for label in labels]
                mark = {True: "✓ right", False: "✗ wrong", None: ""}[card.right]
                rows.append([f"![]({link})" if link else "", *map(escape, said), mark])
            yield from table(["Image", *map(escape, labels), "Verdict"], rows)


def _extent(points: Sequence[tuple[float, float]]) -> list[float | None]:
    """Return how many points there are; the first, last, lowest and highest finite value."""
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return [len(points), None, None, None, None]
    return [len(points), values[0], values[-1], min(values), max(values)]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {show(value)}" for name, value in values.items())
