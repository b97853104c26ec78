"""report.md: the same as the page in lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llavakit import duration
from llavakit.contracts.sections import Curves, Gallery, Section, Table
from llavakit_plugins.reporting.markdown import code, escape, table
from llavakit_plugins.reporting.pictures import Pictures
from llavakit_plugins.reporting.summary import Report
from llavakit_plugins.reporting.values import cells, extent, pairs, show, verdict, words


def lines(report: Report, pictures: Pictures) -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"# {escape(report.name)}\n\n{escape(' · '.join(report.facts))}\n\n## Steps\n"
    yield from table(
        ["Step", "Time", "Result"],
        [
            [
                escape(stage.name),
                "not yet run" if stage.seconds is None else duration(stage.seconds),
                escape(words(pairs(stage.metrics))),
            ]
            for stage in report.stages
        ],
    )
    if report.parts:
        yield "\n## Model\n"
        yield from table(
            ["Part", "Component", "Parameters", "Options"],
            [
                [part.name, escape(part.use), show(part.parameters), escape(pairs(part.options))]
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
            yield f"\nOptions: {escape(pairs(stage.options))}"
        for section in stage.sections:
            yield f"\n### {escape(section.title)}\n"
            if caption := escape(section.caption):
                yield f"*{caption}*\n"
            yield from _section(section, stage.folder, pictures)
    yield "\n## Environment\n"
    facts = [[escape(name), escape(show(value))] for name, value in report.environment.items()]
    yield from table(["Name", "Value"], facts)
    yield f"\n## Recipe\n\n{code(report.recipe, 'toml')}"


def _section(section: Section, folder: Path, pictures: Pictures) -> Iterator[str]:
    match section:
        case Table():
            numeric, texts = cells(section)
            rows = [[escape(text) for text in row] for row in texts]
            yield from table([escape(column) for column in section.columns], rows, numeric)
        case Curves():
            head = [f"{section.y} over {section.x}", "points", "first", "last", "lowest", "highest"]
            extents = section.series.items()
            rows = [[escape(name), *map(show, extent(points))] for name, points in extents]
            yield from table([*map(escape, head)], rows, [False, *[True] * 5])
        case Gallery():
            right, judged = verdict(section)
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
