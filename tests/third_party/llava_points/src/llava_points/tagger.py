"""A generator with sorts of response of its own."""

from __future__ import annotations

from collections.abc import Sequence

from llavakit import Generator, ImageContext, Turn


class Tagger(Generator):
    """The first caption, or the names of what is in the boxes."""

    name = "tagger"
    kinds = ("caption", "tags")

    def generate(self, context: ImageContext, kind: str) -> Sequence[Turn]:
        names = sorted({box.category for box in context.boxes})
        said = context.captions[0] if kind == "caption" else ", ".join(names) or "nothing"
        return [Turn("human", f"<image>\n{kind}?"), Turn("gpt", said)]
