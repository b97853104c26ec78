"""Chooses which samples lie together in a micro-batch, so that little of its room is left empty."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over bins of `capacity` by best fit, longest first.

    Returns the indices in each bin. An item longer than `capacity` gets a bin of its own.
    Deterministic: ties keep the order of `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int, int]] = []  # space left, the newest first of one space, bin
    for number, index in enumerate(order):
        length = lengths[index]
        position = bisect_left(open_bins, (length,))  # the fullest bin with room for it
        if position == len(open_bins):
            bins.append([index])
            chosen, space = len(bins) - 1, capacity - length
        else:
            room, _, chosen = open_bins.pop(position)
            bins[chosen].append(index)
            space = room - length
        if space > 0:  # a full bin needs no further look
            insort(open_bins, (space, -number, chosen))
    return [sorted(items) for items in bins]
