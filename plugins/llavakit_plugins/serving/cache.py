"""A key-value cache in which sequences join and leave.

S sequences, G key-value heads, L rows of the longest, K head dimension.

Sequences have places 0..S-1 without a gap, so that a step of decoding reads one slice of each
tensor and copies nothing. Who leaves is replaced by the last: only that one sequence is moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llavakit.contracts.packing import KVCache
from llavakit_plugins.serving.batch import places_left

_STEP = 128  # rows by which the cache grows: it is copied then


class SharedCache(KVCache):
    """Keys and values of the sequences that are being written."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers, [0])
        self.lengths = []
        self._all_keys: list[Tensor | None] = [None] * layers
        self._all_values: list[Tensor | None] = [None] * layers

    def join(self, read: KVCache, which: int, rows: int) -> None:
        """Copy sequence `which` of another cache behind the last; it may grow to `rows` rows."""
        place, held = len(self.lengths), read.lengths[which]
        for own, theirs in ((self._all_keys, read.keys), (self._all_values, read.values)):
            for layer, tensor in enumerate(theirs):
                if tensor is None:  # a layer that keeps a state instead
                    continue
                grown = _grown(own[layer], tensor, place + 1, rows)
                own[layer] = grown
                grown[place, :, :held] = tensor[which, :, :held]
        for layer, state in enumerate(read.states):
            for name, tensor in state.items():
                new = tensor[which : which + 1]
                before = self.states[layer].get(name)
                self.states[layer][name] = new if before is None else torch.cat((before, new))
        self.lengths.append(held)
        self._show()

    def leave(self, places: Sequence[int]) -> list[int]:
        """Free these places; return which sequence is now at each place that is left."""
        order = places_left(len(self.lengths), places)
        moved = [(place, source) for place, source in enumerate(order) if place != source]
        for place, source in moved:
            for tensor in (*self._all_keys, *self._all_values):
                if tensor is not None:
                    held = self.lengths[source]
                    # only the rows that are filled:
                    # behind them the cache holds nothing that is read
                    tensor[place, :, :held] = tensor[source, :, :held]
        self.states = [{name: state[order] for name, state in of.items()} for of in self.states]
        self.lengths = [self.lengths[source] for source in order]
        if not order:  # nothing is kept of who was here, and no memory
            layers = len(self._all_keys)
            self._all_keys, self._all_values = [None] * layers, [None] * layers
            self.states = [{} for _ in range(layers)]
        self._show()
        return order

    def _show(self) -> None:
        """Set what the attention reads: the places that are taken."""
        count = len(self.lengths)
        self.keys = [None if tensor is None else tensor[:count] for tensor in self._all_keys]
        self.values = [None if tensor is None else tensor[:count] for tensor in self._all_values]


def _grown(held: Tensor | None, like_SGLK: Tensor, places: int, rows: int) -> Tensor:
    """Return a tensor with room for so many places and rows: `held`, or its larger copy."""
    have = (0, 0) if held is None else (held.shape[0], held.shape[2])
    if held is not None and places <= have[0] and rows <= have[1]:
        return held
    rows = max(have[1], -(-rows // _STEP) * _STEP)
    # places grow to powers of two and rows in steps,
    # so that few requests pay for a copy of the cache
    places = max(have[0], 1 << (places - 1).bit_length())
    grown = like_SGLK.new_zeros((places, like_SGLK.shape[1], rows, like_SGLK.shape[3]))
    if held is not None:
        grown[: have[0], :, : have[1]] = held
    return grown
