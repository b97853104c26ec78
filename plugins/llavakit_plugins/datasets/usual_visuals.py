"""What the images and videos of a sample take, as far as the first rows of a data set say it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from llavakit import USUAL, Clip, DataError, Dataset, Registry, Shown, Use, Views
from llavakit.contracts.data import ImageSource, Video
from llavakit_plugins.datasets.conversation_rows import RowReader
from llavakit_plugins.datasets.conversations import ConversationsOptions
from llavakit_plugins.datasets.mix import MixOptions
from llavakit_plugins.datasets.streaming import read_rows

LONG = Clip(640, 480, 1_000_000, 30.0)  #: Longer than what any tiling shows all frames of.
_ROWS = 1000  # of a file that are looked at
_HEADERS = 32  # of videos that are read; others are like these


class Visuals(NamedTuple):
    """What the images and videos of one kind of samples take, and how many samples are so."""

    views: int
    rows: int
    samples: float


def usual_visuals(use: Use[Dataset], views: Views) -> list[Visuals]:
    """Return what samples show, the first of each file standing for all; a plan waits for no more.

    A sample shows one usual image where no file with videos, which the tiling shows, is found.
    """
    plain = [_usual(views)]
    if views.tiling is None or views.tiling.sample(LONG) is None:
        return plain
    return list(_of(use, views, Registry.installed())) or plain


def _of(use: Use[Dataset], views: Views, registry: Registry) -> Iterator[Visuals]:
    options = registry.options(use)
    if isinstance(options, MixOptions):
        weights = options.weights or (1.0,) * len(options.parts)
        for part, weight in zip(options.parts, weights, strict=True):
            expected = registry.chosen(part).expect(registry.options(part))
            of_part = list(_of(part, views, registry)) or [_usual(views)]
            total = sum(found.samples for found in of_part)
            share = weight * (1 if expected is None else expected[0]) / total
            yield from (found._replace(samples=found.samples * share) for found in of_part)
    elif isinstance(options, ConversationsOptions) and options.path.is_file():
        folder = options.images or options.path.parent
        reader = RowReader(str(options.path), folder, options.kind)
        rows = islice(read_rows(options.path), min(_ROWS, options.limit or _ROWS))
        shown = [reader.inspect(row.value, number)[2] for number, row in enumerate(rows)]
        if any(isinstance(one, Video) for images in shown for one in images):
            yield from _counted(shown, views)


def _counted(samples: Sequence[Sequence[ImageSource]], views: Views) -> Iterator[Visuals]:
    known: list[Shown] = []  # of the videos whose headers were read
    videos = 0
    for images in samples:
        stills = sum(not isinstance(image, Video) for image in images)
        arranged = [views.of(USUAL._replace(images=stills))] * stills
        for video in (image for image in images if isinstance(image, Video)):
            if videos < _HEADERS:
                known.append(_shown(video, views))
            arranged.append(views.of(known[videos % _HEADERS]))
            videos += 1
        yield Visuals(
            sum(one.views for one in arranged), sum(len(one.index_RK) for one in arranged), 1.0
        )


def _shown(video: Video, views: Views) -> Shown:
    try:
        (found,) = views.shown([video], "a plan's sample")
    except DataError:  # it is not here yet, or nothing that reads it: taken for a long one
        frames = views.tiling.sample(LONG) if views.tiling is not None else None
        return Shown(LONG.width, LONG.height, 0, len(frames or ()))
    return found


def _usual(views: Views) -> Visuals:
    usual = views.of()
    return Visuals(usual.views, len(usual.index_RK), 1.0)
