"""The concept-balanced choice of captions (arXiv 2304.08485, appendix E).

1. Count the captions of each noun phrase. 2. Drop phrases with fewer than `minimum` captions.
3. From the rarest to the most frequent phrase, put all captions with the phrase into the pool.
4. Of a phrase with more than `most` captions, put only `most` random ones into the pool.

The paper leaves some points open. Here a phrase counts once per caption, in lower case and without
determiners. The `most` captions are drawn from all captions of the phrase, also from those that are
in the pool already, so the order of phrases does not matter. Each phrase has a random generator of
its own, `numpy.random.default_rng([seed, hash])`, so no draw depends on another phrase's.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, Pool
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llavakit_plugins.generation.curation.phrases import blocks_of, hash_block, name_block

_BLOCK = 4096  # captions that are sent to a worker at once
_AHEAD = 4  # waiting blocks for each worker: this limits the captions in memory
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Postings:
    """The phrases of each caption; C captions and N postings (pairs of phrase and caption)."""

    phrase_N: NDArray[np.uint64]
    """Hash of the phrase."""
    caption_N: NDArray[np.int32]
    """Number of the caption, ascending."""
    captions: int


@dataclass(frozen=True)
class Choice:
    """The chosen captions, and statistics of the P phrases in the order of their hashes."""

    chosen_C: NDArray[np.bool_]
    phrase_P: NDArray[np.uint64]
    before_P: NDArray[np.int64]
    """Number of captions with the phrase."""
    after_P: NDArray[np.int64]
    """Number of captions in the pool with the phrase, also for dropped phrases."""


@contextmanager
def worker_pool(workers: int) -> Iterator[Pool]:
    """Yield a pool of processes that load the chunker only.

    They are spawned: forked ones would inherit torch's memory and threads.
    """
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool


def _stream(
    pool: Pool,
    work: Callable[[tuple[str, Sequence[str]]], ResultT],
    chunker: str,
    captions: Iterable[str],
    workers: int,
) -> Iterator[ResultT]:
    """Yield the results of blocks in order; a few blocks are computed ahead.

    Not `Pool.imap`, which reads all captions at once and does not wait for its consumer.
    """
    waiting: deque[AsyncResult[ResultT]] = deque()
    for block in blocks_of(captions, _BLOCK):
        waiting.append(pool.apply_async(work, ((chunker, block),)))
        if len(waiting) >= _AHEAD * workers:
            yield waiting.popleft().get()
    while waiting:
        yield waiting.popleft().get()


def find_phrases(
    captions: Iterable[str],
    chunker: str,
    pool: Pool,
    workers: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Postings:
    """Return the phrases of all captions. The captions are read once and not kept."""
    counts: list[NDArray[np.uint16]] = []
    hashes: list[NDArray[np.uint64]] = []
    done = 0
    for many, found in _stream(pool, hash_block, chunker, captions, workers):
        counts.append(np.frombuffer(many, np.uint16))
        hashes.append(np.frombuffer(found, np.uint64))
        done += len(counts[-1])
        progress(done)
    each = np.concatenate(counts) if counts else np.zeros(0, np.uint16)
    caption_N = np.repeat(np.arange(len(each), dtype=np.int32), each)
    phrase_N = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    return Postings(phrase_N, caption_N, len(each))


def choose(postings: Postings, *, minimum: int, most: int, seed: int) -> Choice:
    """Return the captions of the pool.

    Works on sorted arrays, because CC3M's postings would take many gigabytes as Python objects.
    """
    order_N = np.argsort(postings.phrase_N, kind="stable")  # captions of a phrase stay ascending
    sorted_N = postings.phrase_N[order_N]
    starts_P = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]][: len(sorted_N)])
    phrase_P = sorted_N[starts_P]
    del sorted_N  # each of these arrays can take hundreds of megabytes
    before_P = np.diff(np.r_[starts_P, len(order_N)])
    caption_N = postings.caption_N[order_N]
    del order_N
    chosen_C = np.zeros(postings.captions, bool)
    # phrases that are taken whole need no loop; only the frequent ones are drawn one by one, below
    few_P = (before_P >= minimum) & (before_P <= most)
    chosen_C[caption_N[np.repeat(few_P, before_P)]] = True
    frequent = np.flatnonzero(before_P > max(most, minimum - 1))
    for index in frequent[np.argsort(before_P[frequent], kind="stable")]:
        start, count = starts_P[index], before_P[index]
        draw = np.random.default_rng([seed, int(phrase_P[index])])
        picked = draw.choice(count, most, replace=False)
        chosen_C[caption_N[start + picked]] = True
    after_N = chosen_C[caption_N]
    after_P = np.add.reduceat(after_N, starts_P, dtype=np.int64) if len(starts_P) else before_P
    return Choice(chosen_C, phrase_P, before_P, after_P)


def name_phrases(captions: Iterable[str], chunker: str, pool: Pool, workers: int) -> Iterator[str]:
    """Yield the phrases of captions; a phrase may come several times."""
    for names in _stream(pool, name_block, chunker, captions, workers):
        yield from names


def ranks(counts: NDArray[Any], points: int = 300) -> list[tuple[float, float]]:
    """Return (rank, count) pairs from the most frequent phrase on, thinned for a plot.

    The ranks are spaced evenly on a logarithmic axis.
    """
    sorted_counts = np.sort(counts[counts > 0])[::-1]
    if not len(sorted_counts):
        return []
    chosen = np.unique(np.geomspace(1, len(sorted_counts), points).astype(np.int64))
    return [(float(rank), float(sorted_counts[rank - 1])) for rank in chosen]
