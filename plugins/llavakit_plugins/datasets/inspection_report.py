"""What a data set holds, and its faults: the report of `llava-run check-data`."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

KEPT = 100
"""Findings of one sort whose sentences are kept; the others are counted."""
_EDGES = (0, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)


class Tokens(BaseModel):
    """The distribution of a number of tokens over the samples."""

    total: int
    mean: float
    median: int
    p95: int
    longest: int
    edges: list[int]
    """Of the histogram's bins: bin i counts edges[i] to edges[i + 1] - 1, the last one is open."""
    counts: list[int]


class Sort(BaseModel):
    """All findings of one sort."""

    sort: str
    count: int
    stops: bool
    """Whether training would refuse the data because of them."""
    messages: list[str]
    """The first of them."""


class Report(BaseModel):
    """The content of a data set, and its faults."""

    data: str
    usable: bool
    """Whether training would start."""
    rows: int
    samples: int
    """Rows that can be used."""
    image_samples: int
    """Samples with exactly one image."""
    multi_image_samples: int
    text_samples: int
    preferences: int
    """Samples with a rejected answer, too; their tokens are counted with either answer."""
    turns: int
    most_turns: int
    images: int
    """Uses of images in samples."""
    videos: int
    """Uses of videos in samples; to other counts a video is an image of its sample."""
    distinct_videos: int
    distinct_images: int
    missing_images: int
    broken_images: int
    duplicate_ids: int
    """Rows with the id of an earlier row."""
    max_length: int
    visual_tokens: int
    """Embeddings of a view, which are an image's rows where it is one view."""
    tiling: str | None
    """What cut images into views, if anything did."""
    counted_with: Literal["the tokenizer", "characters (an estimate)"]
    tokens: Tokens | None
    """Stream rows of a sample, images included, before it is cut."""
    learned_tokens: Tokens | None
    """Supervised rows of a sample, after it is cut."""
    cut: int
    """Samples longer than `max_length`."""
    nothing_learned: int
    """Samples without a supervised token after the cut."""
    findings: list[Sort]
    seconds: float
    rows_per_second: float


def distribution(values: npt.NDArray[np.int64]) -> Tokens | None:
    """Return the distribution of a number of tokens; None of no samples."""
    if not len(values):
        return None
    longest = int(values.max())
    edges = [edge for edge in _EDGES if edge <= longest]
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges))
    return Tokens(
        total=int(values.sum()),
        mean=round(float(values.mean()), 1),
        median=int(np.median(values)),
        p95=int(np.percentile(values, 95)),
        longest=longest,
        edges=edges,
        counts=counts.tolist(),
    )
