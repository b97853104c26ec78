"""What a step shows in the report: curves, tables, galleries. Plain data that a JSON file keeps."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Curves(BaseModel):
    """Lines over a common axis."""

    kind: Literal["curves"] = "curves"
    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    caption: str = ""
    log: bool | None = None  #: Whether the y axis is logarithmic; None: where that reads better.


class Table(BaseModel):
    """Rows of text and numbers under a head."""

    kind: Literal["table"] = "table"
    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]
    caption: str = ""


class Card(BaseModel):
    """One image with what was asked, answered and true."""

    image: str | None = None  #: Path of an image file, relative to the step's folder.
    lines: list[tuple[str, str]]  #: (label, text), such as ("question", "Which digit is it?").
    right: bool | None = None


class Gallery(BaseModel):
    """A grid of cards."""

    kind: Literal["gallery"] = "gallery"
    title: str
    cards: list[Card]
    caption: str = ""


Section = Curves | Table | Gallery
