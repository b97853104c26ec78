"""Writes a page for people who review a random sample: image, context, reply, verdict."""

from __future__ import annotations

import os
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llavakit import printable, write_text
from llavakit.contracts.data import IMAGE
from llavakit.contracts.sections import Card, Gallery
from llavakit_plugins.generation.items import Item
from llavakit_plugins.generation.rows import find_image
from llavakit_plugins.media.images import open_file

if TYPE_CHECKING:
    from jinja2 import Template

    from llavakit_plugins.generation.summary import Summary

_SAMPLE = 60  # replies on the page
_UNUSABLE = 12  # rejected replies that are shown besides, since they may be rare in the sample
_IN_REPORT = 9  # replies in the run's report
_TIME = "%Y-%m-%d %H:%M UTC"
_SIDE = 480  # longest side of an image in pixels: more than is shown, for dense screens


class Draw:
    """A uniform random sample of a stream of unknown length, in the stream's order.

    Reservoir sampling (Vitter's algorithm R), so that only the sample is kept in memory.
    """

    def __init__(self, size: int, seed: Sequence[int]) -> None:
        self._size, self._draw = size, np.random.default_rng(seed)
        self._kept: dict[int, tuple[int, Item]] = {}
        self.total = 0

    def see(self, item: Item) -> None:
        """Take the next item; it enters the sample by chance."""
        # the n-th item replaces a kept one with the chance size / n: all are then equally likely
        slot = self.total if self.total < self._size else int(self._draw.integers(self.total + 1))
        if slot < self._size:
            self._kept[slot] = (self.total, item)
        self.total += 1

    def items(self) -> list[Item]:
        """Return the sample in the order of the stream."""
        return [item for _, item in sorted(self._kept.values(), key=itemgetter(0))]


class Review:
    """The sample of a job, and the page that shows it."""

    def __init__(self, images: Path | None, seed: int) -> None:
        self._images = images
        self._replies, self._unusable = Draw(_SAMPLE, [seed, 4]), Draw(_UNUSABLE, [seed, 5])

    def see(self, item: Item, unanswered: str) -> None:
        """Take the next item; `unanswered` is the reason why it has no reply, or empty."""
        if item.entry is not None:
            self._replies.see(item)
        if unanswered or (item.verdict is not None and item.verdict.outcome == "rejected"):
            self._unusable.see(replace(item, refused=(*item.refused, unanswered)))

    def gallery(self, folder: Path) -> Gallery:
        """Return the first items of the sample for the report; paths are relative to `folder`."""
        cards = []
        for item in self._replies.items()[:_IN_REPORT]:
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

    def write(self, path: Path, summary: Summary, facts: Sequence[str]) -> None:
        """Write the page; images are embedded, so it needs no other file."""
        cards = [self._card(item) for item in self._replies.items()]
        shown = {card["id"] for card in cards}
        unusable = [self._card(item) for item in self._unusable.items()]
        text = _template().render(
            facts=facts,
            sections=summary.plots(),
            firsts=summary.firsts(),
            kinds=summary.kinds,
            verdicts=sorted({card["verdict"] for card in cards}),
            cards=cards,
            total=self._replies.total,
            unusable=[card for card in unusable if card["id"] not in shown],
            unusable_total=self._unusable.total,
        )
        write_text(path, printable(text))

    def _card(self, item: Item) -> dict[str, Any]:
        verdict, entry = item.verdict, item.entry
        image = find_image(self._images, item.context)
        missing = f"{item.context.image} is not there" if self._images and image is None else ""
        outcome = verdict.outcome if verdict else "unanswered"
        repairs = verdict.notes if verdict and outcome == "repaired" else ()
        came = "" if entry is None else time.strftime(_TIME, time.gmtime(entry.time))
        return {
            "id": f"{item.context.id}-{item.kind}",
            "kind": item.kind,
            "facts": f"{entry.model}, {came}" if entry else "",
            "image": "" if image is None else _thumbnail(image),
            "missing": missing,
            "told": item.request.messages[-1].content,
            "reply": entry.text if entry else "",
            "verdict": outcome,
            "notes": [
                *(f"repaired: {note}" for note in repairs),
                *(f"attempt {n}: {why}" for n, why in enumerate(item.refused, start=1) if why),
            ],
            "turns": [
                (turn.role, turn.text.replace(IMAGE, "").strip())
                for turn in (verdict.turns if verdict else ())
            ],
        }


def _thumbnail(path: Path) -> str:
    """Return a small copy of an image as a data URI, or an empty text if it cannot be read."""
    try:
        with open_file(path) as image:
            small = image.convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
    # Pillow's decoders raise each of these for damaged files
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    buffer = BytesIO()
    small.save(buffer, "jpeg", quality=80)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode('ascii')}"


@cache
def _template() -> Template:
    from jinja2 import PackageLoader

    from llavakit_plugins.reporting.page import page_environment

    own = PackageLoader("llavakit_plugins.generation", "")
    return page_environment(own).get_template("review.html.jinja")
