"""Draws the demo's scenes: coloured handwritten digits, with captions and boxes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from llavakit import ImageContext, LlavaError, Options, Outcome, Run, Step, explain_write
from llavakit.contracts.run import ProcessGroup
from llavakit.contracts.sections import Card, Gallery
from llavakit_plugins.generation.contexts import write_contexts
from llavakit_plugins.generation.scenes import FAMILY, Scene, Split, compose
from llavakit_plugins.reporting.pictures import save_image
from llavakit_plugins.training.forks import begin_fork, held_signals
from llavakit_plugins.training.workers import processes_for

_SHOWN = 12
_TOGETHER = 256  # scenes that are drawn by one process, one behind the other


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
        with _savers(run.directory / "images", run.process_group) as saved:
            for name, split, count, most, squares in plans:
                contexts: list[ImageContext] = []
                # whole families are composed and the last one is cut,
                # so that `count` need not be a multiple
                scenes = compose(split, -(-count // FAMILY), run.seed, most, squares)
                for begin in range(0, count, _TOGETHER):
                    some = list(islice(scenes, min(_TOGETHER, count - begin)))
                    ids = [f"{name}-{begin + number:06}" for number in range(len(some))]
                    images = [f"{identity}.png" for identity in ids]
                    saved(list(zip(some, images, strict=True)))
                    contexts += map(Scene.context, some, ids, images)
                    done += len(some)
                    run.progress(done, total, "drawing")
                write_contexts(run.directory / f"{name}.jsonl", contexts)
                if name == "test":
                    # neighbours belong to one family and look alike
                    stride = max(1, len(contexts) // _SHOWN)
                    shown = [_card(context) for context in contexts[::stride][:_SHOWN]]
        gallery = Gallery(title="Held-out scenes and what a teacher is told", cards=shown)
        return Outcome({"train": options.train + options.single, "test": options.test}, [gallery])


_Saved = Sequence[tuple[Scene, str]]
"""Scenes, and the names of their files."""


@contextmanager
def _savers(folder: Path, group: ProcessGroup) -> Iterator[Callable[[_Saved], object]]:
    """Yield a function that draws scenes and writes their images, in the end all of them.

    The CPU's cores do so beside this process, where it may be forked.
    """
    processes = processes_for(group, None)
    if processes == 1:
        yield partial(_save, folder)
        return
    context = multiprocessing.get_context("fork")
    waiting: list[Future[None]] = []
    with ProcessPoolExecutor(processes, context, initializer=begin_fork) as pool:

        def save(scenes: _Saved) -> None:
            with held_signals():
                waiting.append(pool.submit(_save, folder, scenes))

        try:
            yield save
            for one in waiting:
                one.result()
        except BrokenProcessPool as error:
            raise LlavaError(
                "a process that drew scenes was killed, as a system does that runs out of memory; "
                "close other programs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _save(folder: Path, scenes: _Saved) -> None:
    for scene, name in scenes:
        save_image(scene.draw(), folder / name)


def _card(context: ImageContext) -> Card:
    boxes = ", ".join(f"{box.category} {list(box.corners)}" for box in context.boxes)
    lines = [("caption", context.captions[0]), ("boxes", boxes)]
    return Card(image=f"images/{context.image}", lines=lines)
