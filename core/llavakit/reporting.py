"""report.html and report.md: what a run did and what came of it, in one self-contained file each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel

from llavakit.files import write_text

if TYPE_CHECKING:
    from jinja2 import Template
    from PIL.Image import Image

    from llavakit.charts import Chart
    from llavakit.recipe import Recipe

_SIDE = 384  # of an embedded image, in pixels
_SMALL = 128  # shown magnified, so every pixel is kept: PNG


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
    report = _collect(recipe, directory, records)
    pictures = _Pictures(directory)
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


def _text(value: object) -> str:
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
            return ", ".join(map(_text, value))
    return str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_numeric(table: Table, column: int) -> bool:
    cells = {type(row[column]) for row in table.rows if column < len(row)} - {type(None)}
    return bool(cells) and cells <= {int, float}


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
    page.globals["style"] = Markup(style)  # noqa: S704 - our own file
    page.filters |= {
        "chart": _chart,
        "duration": duration,
        "is_numeric": _is_numeric,
        "text": _text,
        "verdict": _verdict,
        "words": _words,
    }
    return page.get_template("report.html.jinja")


def _chart(curves: Curves) -> Chart:
    from llavakit.charts import draw_lines

    return draw_lines(curves.series, title=curves.title, x=curves.x, y=curves.y, log=curves.log)


@dataclass(frozen=True)
class _Picture:
    """An embedded image, or a note that says why there is none."""

    data: str = ""
    width: int = 0
    height: int = 0
    small: bool = False
    note: str = ""


class _Pictures:
    """Finds and embeds the images of the cards, each once."""

    def __init__(self, directory: Path) -> None:
        self._root = directory.resolve()
        self._known: dict[Path, _Picture] = {}

    def find(self, card: Card, folder: Path) -> tuple[Path | None, str]:
        """Return the card's image file, or a note that says why there is none."""
        if not card.image:
            return None, ""
        try:
            path = (folder / card.image).resolve()
            if not path.is_relative_to(self._root):
                return None, "not shown: the image is outside of the run's folder"
            if not path.is_file():
                return None, f"no such image: {card.image}"
        except (OSError, ValueError, RuntimeError) as error:  # a name no system takes, a link loop
            return None, f"not an image path: {error}"
        return path, ""

    def link(self, card: Card, folder: Path) -> str:
        """Return the image's path relative to the run's folder, quoted, or nothing."""
        path, _ = self.find(card, folder)
        return "" if path is None else quote(path.relative_to(self._root).as_posix())

    def embed(self, card: Card, folder: Path) -> _Picture:
        """Return the card's image as a data URI."""
        path, note = self.find(card, folder)
        if path is None:
            return _Picture(note=note)
        if path not in self._known:
            self._known[path] = _embed(path)
        return self._known[path]


def _embed(path: Path) -> _Picture:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
            elif image.mode != "L":
                image = image.convert("RGB")
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            data = min(_encodings(image), key=len)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return _Picture(note=f"cannot be read as an image: {path.name}")
    return _Picture(data, *image.size, small=max(image.size) <= _SMALL)


def _encodings(image: Image) -> Iterator[str]:
    from base64 import b64encode
    from io import BytesIO

    lossless = image.mode == "RGBA" or max(image.size) <= _SMALL
    kinds: list[tuple[str, dict[str, Any]]] = []
    if lossless or image.getcolors(4096):  # a photograph is never smaller as PNG, and slow
        kinds.append(("png", {"optimize": lossless}))
    if not lossless:
        kinds.append(("jpeg", {"quality": 85, "optimize": True}))
    for kind, options in kinds:
        buffer = BytesIO()
        image.save(buffer, kind, **options)
        yield f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode('ascii')}"


# -- Markdown --------------------------------------------------------------------------------------

_SPECIAL = re.compile(r"[\\`*\[\]<>|~]|&(?=[#\w])|(?<!\w)_|_(?!\w)")


def _markdown(report: _Report, pictures: _Pictures) -> Iterator[str]:
    from llavakit.progress import duration

    yield f"# {_escape(report.name)}\n\n{_escape(' · '.join(report.facts))}\n\n## Steps\n"
    yield from _grid(
        ["Step", "Time", "Result"],
        [
            [s.name, "not yet run" if s.seconds is None else duration(s.seconds), _pairs(s.metrics)]
            for s in report.stages
        ],
    )
    yield "\n## Model\n"
    parts = [[part.name, part.use, part.parameters, _pairs(part.options)] for part in report.parts]
    yield from _grid(["Part", "Component", "Parameters", "Options"], parts)
    for stage in report.stages:
        if stage.seconds is None:
            continue
        yield f"\n## {_escape(stage.name)}\n\n{duration(stage.seconds)}\n"
        if stage.metrics:
            yield from _grid(["Metric", "Value"], [[_words(k), v] for k, v in stage.metrics.items()])
        if stage.options:
            yield f"\nOptions: {_escape(_pairs(stage.options))}"
        for section in stage.sections:
            yield f"\n### {_escape(section.title)}\n"
            if section.caption.strip():
                yield f"*{_escape(section.caption.strip())}*\n"
            yield from _section(section, stage.folder, pictures)
    yield "\n## Environment\n"
    yield from _grid(["", ""], [[name, value] for name, value in report.environment.items()])
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", report.recipe)), default=0))
    yield f"\n## Recipe\n\n{fence}toml\n{report.recipe}\n{fence}"


def _section(section: Section, folder: Path, pictures: _Pictures) -> Iterator[str]:
    match section:
        case Table():
            right = [_is_numeric(section, column) for column in range(len(section.columns))]
            yield from _grid(section.columns, section.rows, right)
        case Curves():
            yield from _grid(
                [f"{section.y} over {section.x}", "points", "first", "last", "lowest", "highest"],
                [[name, *_extent(points)] for name, points in section.series.items()],
                [False, *[True] * 5],
            )
        case Gallery():
            right_cards, judged = _verdict(section)
            if judged:
                yield f"{right_cards} of {judged} right\n"
            labels = list(dict.fromkeys(label for card in section.cards for label, _ in card.lines))
            yield _row(["", *map(_escape, labels), ""])
            yield _row(["---"] * (len(labels) + 2))
            for card in section.cards:
                link = pictures.link(card, folder)
                said = ["; ".join(t for la, t in card.lines if la == label) for label in labels]
                mark = {True: "✓ right", False: "✗ wrong", None: ""}[card.right]
                yield _row([f"![]({link})" if link else "", *map(_escape, said), mark])


def _extent(points: Sequence[tuple[float, float]]) -> list[Any]:
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return [len(points), None, None, None, None]
    return [len(points), values[0], values[-1], min(values), max(values)]


def _grid(
    head: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[bool] = ()
) -> Iterator[str]:
    """Yield a Markdown table; rows that are too long or short are taken as they are."""
    width = max(len(head), *(len(row) for row in rows), 1) if rows else max(len(head), 1)
    rules = [rule for _, rule in zip_longest(range(width), ("--:" if r else "---" for r in right))]
    yield _row([*map(_escape, head), *[""] * (width - len(head))])
    yield _row([rule or "---" for rule in rules])
    for row in rows:
        yield _row([*(_escape(_text(cell)) for cell in row), *[""] * (width - len(row))])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_words(name)} {_text(value)}" for name, value in values.items())


def _escape(text: str) -> str:
    lines = (_SPECIAL.sub(r"\\\g<0>", line.strip()) for line in text.splitlines())
    return "<br>".join(line for line in lines if line)
