"""A page on which a person reads a random sample: image, context, reply, verdict."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llavakit.files import write_text
from llavakit.reporting import Card, Curves, Gallery, Table
from llavakit.samples import IMAGE
from llavakit_plugins.contexts import as_text
from llavakit_plugins.steps.generate import find_image
from llavakit_plugins.steps.generation.items import Item

if TYPE_CHECKING:
    from jinja2 import Template

_SAMPLE = 60
_IN_REPORT = 9
_SIDE = 320  # of an image, in pixels


class Review:
    """The sample and its page."""

    def __init__(self, images: Path | None) -> None:
        self._images = images
        self._wanted: set[int] = set()
        self._at = 0
        self._total = 0
        self._items: list[Item] = []

    def sample(self, total: int, seed: int) -> None:
        """Draw which of so many items are shown."""
        order = np.random.default_rng([seed, 4]).permutation(total)
        self._wanted = set(order[:_SAMPLE].tolist())
        self._total = total

    def see(self, item: Item) -> None:
        """Take the next item, if it was drawn."""
        if self._at in self._wanted:
            self._items.append(item)
        self._at += 1

    def gallery(self, folder: Path) -> Gallery:
        """Return the first of the sample for the report of a step whose folder this is."""
        cards = []
        for item in self._items[:_IN_REPORT]:
            image = find_image(self._images, item.context)
            reply = item.entry.text if item.entry else "no reply"
            outcome = item.verdict.outcome if item.verdict else "unanswered"
            lines = [
                ("told", item.context.captions[0] if item.context.captions else ""),
                (item.kind, reply),
                ("verdict", "; ".join([outcome, *(item.verdict.notes if item.verdict else ())])),
            ]
            shown = None if image is None else os.path.relpath(image, folder)
            cards.append(Card(image=shown, lines=lines))
        return Gallery(
            title="What the teacher wrote", cards=cards, caption="More in the step's review.html."
        )

    def write(self, path: Path, sections: Sequence[Table | Curves], seed: int) -> None:
        """Write the page; it needs no other file."""
        cards = [self._card(item) for item in self._items]
        text = _template().render(cards=cards, sections=sections, total=self._total, seed=seed)
        write_text(path, text.encode("utf-8", "replace").decode("utf-8"))

    def _card(self, item: Item) -> dict[str, Any]:
        image = find_image(self._images, item.context)
        return {
            "id": f"{item.context.id}-{item.kind}",
            "kind": item.kind,
            "image": "" if image is None else _thumbnail(image),
            "told": as_text(item.context, boxes=True),
            "reply": item.entry.text if item.entry else "",
            "verdict": item.verdict.outcome if item.verdict else "unanswered",
            "notes": [*_repairs(item), *(f"rejected before: {why}" for why in item.refused)],
            "turns": [
                (turn.role, turn.text.replace(IMAGE, "").strip())
                for turn in (item.verdict.turns if item.verdict else ())
            ],
        }


def _repairs(item: Item) -> tuple[str, ...]:
    usable = item.verdict is not None and item.verdict.outcome != "rejected"
    return item.verdict.notes if usable and item.verdict is not None else ()


def _thumbnail(path: Path) -> str:
    """Return a small copy of an image as a data URI, or nothing where it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    buffer = BytesIO()
    small.save(buffer, "jpeg", quality=80)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode('ascii')}"


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from llavakit.reporting.charts import draw_lines

    page = Environment(
        loader=PackageLoader("llavakit_plugins.steps", "generation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["chart"] = lambda curves: draw_lines(
        curves.series, title=curves.title, x=curves.x, y=curves.y, log=curves.log
    )
    return page.get_template("review.html.jinja")
