"""Draws the demo's scenes: coloured handwritten digits, with captions and boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from llavakit import ImageContext, Options, Outcome, Run, Step, explain_write
from llavakit.contracts.sections import Card, Gallery
from llavakit_plugins.generation.contexts import write_contexts
from llavakit_plugins.generation.scenes import FAMILY, Scene, Split, compose
from llavakit_plugins.reporting.pictures import save_image

_SHOWN = 12


class ScenesOptions(Options):
    train: int = Field(default=8192, ge=FAMILY)
    """Number of scenes for training."""
    single: int = Field(default=0, ge=0)
    """Further scenes for training with one digit each; they are used first."""
    most: int = Field(default=3, ge=1, le=3)
    """Most digits of a scene."""
    squares: Literal[1, 3] = 1
    """Edge of a scene in squares of 72 pixels; the digits stay as small. Those of `single` are
    always of one square."""
    test: int = Field(default=512, ge=FAMILY)
    """Held-out scenes, drawn with glyphs that no other scene has."""


class Scenes(Step):
    """Leaves `train.jsonl`, `single.jsonl`, `test.jsonl` and `images/`."""

    name = "scenes"
    Options = ScenesOptions

    def __init__(self, options: ScenesOptions) -> None:
        self.options = options

    def run(self, run: Run) -> Outcome:
        options = self.options
        total = options.train + options.single + options.test
        done = 0
        shown: list[Card] = []
        with explain_write(run.directory):
            (run.directory / "images").mkdir(exist_ok=True)
        plans: tuple[tuple[str, Split, int, int, int], ...] = (
            ("single", "train", options.single, 1, 1),
            ("train", "train", options.train, options.most, options.squares),
            ("test", "test", options.test, options.most, options.squares),
        )
        for name, split, count, most, squares in plans:
            contexts: list[ImageContext] = []
            # whole families are composed and the last one is cut,
            # so that `count` need not be a multiple
            families = -(-count // FAMILY)
            for scene in compose(split, families, run.seed, most, squares):
                if len(contexts) == count:
                    break
                contexts.append(_save(scene, f"{name}-{len(contexts):06}", run.directory))
                done += 1
                if done % 512 == 0 or done == total:
                    run.progress(done, total, "drawing")
            write_contexts(run.directory / f"{name}.jsonl", contexts)
            if name == "test":
                # neighbours belong to one family and look alike
                stride = max(1, len(contexts) // _SHOWN)
                shown = [_card(context) for context in contexts[::stride][:_SHOWN]]
        gallery = Gallery(title="Held-out scenes and what a teacher is told", cards=shown)
        return Outcome({"train": options.train + options.single, "test": options.test}, [gallery])


def _save(scene: Scene, identity: str, folder: Path) -> ImageContext:
    context = scene.context(identity, f"{identity}.png")
    save_image(scene.draw(), folder / "images" / context.image)
    return context


def _card(context: ImageContext) -> Card:
    boxes = ", ".join(f"{box.category} {list(box.corners)}" for box in context.boxes)
    lines = [("caption", context.captions[0]), ("boxes", boxes)]
    return Card(image=f"images/{context.image}", lines=lines)
