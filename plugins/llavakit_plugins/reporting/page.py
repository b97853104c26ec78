"""report.html, one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llavakit import duration, printable
from llavakit.contracts.sections import Curves, Table
from llavakit_plugins.reporting.charts import Chart, draw_lines
from llavakit_plugins.reporting.pictures import Pictures
from llavakit_plugins.reporting.summary import Report
from llavakit_plugins.reporting.values import cells, show, verdict, words


def page(report: Report, pictures: Pictures) -> str:
    """Return the page of a run."""
    page = _environment().get_template("report.html.jinja")
    return printable(page.render(report=report, pictures=pictures))


def comparison_page(
    title: str, facts: Sequence[str], sections: Sequence[Table], notes: Sequence[str]
) -> str:
    """Return the page of a comparison of runs."""
    page = _environment().get_template("comparison.html.jinja")
    return printable(page.render(title=title, facts=facts, sections=sections, notes=notes))


@cache
def _environment() -> Environment:
    return page_environment()


def page_environment(*loaders: BaseLoader) -> Environment:
    """Return what pages are made with: the report's style, filters and templates.

    `loaders` find templates of one's own, before the report's.
    """
    report = PackageLoader("llavakit_plugins.reporting", "")
    environment = Environment(
        loader=ChoiceLoader([*loaders, report]),
        # answers of models and texts of data sets stand on the page:
        # none of them may be read as HTML
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, _, _ = report.get_source(environment, "report.css")
    environment.globals["style"] = Markup(style)
    environment.filters |= {
        "cells": cells,
        "chart": _chart,
        "duration": duration,
        "show": show,
        "verdict": verdict,
        "words": words,
    }
    return environment


def _chart(curves: Curves) -> Chart:
    return draw_lines(curves.series, title=curves.title, x=curves.x, y=curves.y, log=curves.log)
