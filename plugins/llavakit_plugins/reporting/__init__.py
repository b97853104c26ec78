"""report.html and report.md: what a run did and what came of it, in one file each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavakit.contracts.sections import Card, Curves, Gallery, Section, StepRecord, Table
from llavakit.files import write_text

if TYPE_CHECKING:
    from llavakit.recipe.recipe import Recipe

__all__ = [
    "Card",
    "Curves",
    "Gallery",
    "Section",
    "StepRecord",
    "Table",
    "write_report",
]


def write_report(recipe: Recipe, directory: Path, records: Sequence[StepRecord]) -> None:
    """Write report.html and report.md of the steps that are done.

    Raises LlavaError where they cannot be written. An image that is missing, damaged or outside of
    `directory` leaves a note in its place.
    """
    from llavakit_plugins.reporting.page import page
    from llavakit_plugins.reporting.pictures import Pictures
    from llavakit_plugins.reporting.summary import collect
    from llavakit_plugins.reporting.text import lines

    report = collect(recipe, directory, records)
    pictures = Pictures(directory)
    write_text(directory / "report.html", page(report, pictures))
    write_text(directory / "report.md", "\n".join(lines(report, pictures)) + "\n")
