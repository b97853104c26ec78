"""A decoder whose sequences join and leave while others go on.

B sequences, T rows, E width, V vocabulary, G key-value heads, K head dimension, P rows of a cache.

With GroupQueryAttention on a CPU the sequences lie in one buffer: who joins is written behind the
last, and who leaves is replaced by the last. In all other cases the whole cache is copied when
sequences come or go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llavakit_plugins.onnx.runtime.sessions import CacheArray, Decoder, FloatArray, IntArray
from llavakit_plugins.serving.batch import places_left

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from llavakit_plugins.onnx.runtime.folder import Shapes

_STEP = 128  # rows by which buffers grow


class SharedDecoder(Decoder):
    """Decodes sequences that were read one by one, each by a decoder of its own."""

    def __init__(
        self, session: InferenceSession, shapes: Shapes, *, in_place: bool, provider: str
    ) -> None:
        super().__init__(session, shapes, in_place=in_place, provider=provider)
        self.lengths: list[int] = []  #: Tokens of each sequence.
        self._buffers: list[CacheArray] = []  #: `[places, G, P, K]`; sequences are the first B.

    @classmethod
    def beside(cls, decoder: Decoder) -> SharedDecoder:
        """Return one with the same session, and a cache of its own."""
        return cls(
            decoder.session, decoder.shapes, in_place=decoder.in_place, provider=decoder.device
        )

    def read_on(self, embeds_1TE: FloatArray, capacity: int) -> FloatArray:
        """Read the next rows of one sequence of at most `capacity` rows; return logits `[1, V]`."""
        rows = embeds_1TE.shape[1]
        if not self.lengths:
            real_1T = np.ones((1, rows), np.int64)
            logits_1KV = self.read(embeds_1TE, real_1T, keep=1, capacity=capacity)
            self.lengths = [rows]
            return logits_1KV[:, -1]
        begin = self.lengths[0]
        self._mask_BL = np.ones((1, begin + rows), np.int64)
        positions_1T = np.arange(begin, begin + rows, dtype=np.int64)[None]
        self.lengths = [begin + rows]
        self._binding = None  # outputs are bound with their shape, and each chunk has its own
        logits_1KV = self._run(self._bind(keep=1), embeds_1TE, positions_1T)
        self._binding = None
        return logits_1KV[:, -1]

    def join(self, other: SharedDecoder, rows: int) -> None:
        """Add the one sequence of another decoder; it may grow to `rows` rows."""
        (held,) = other.lengths
        taken = len(self.lengths)
        new = [value.numpy()[:, :, :held] for value in other._cache]
        self.lengths.append(held)
        if self.in_place:
            self._buffers = [
                _grown(self._buffers[n] if self._buffers else None, one, taken, rows)
                for n, one in enumerate(new)
            ]
            for buffer, one in zip(self._buffers, new, strict=True):
                buffer[taken, :, :held] = one[0]
            self._show()
            return
        before = self._compact(range(taken))
        longest = max(self.lengths)
        self._set([_stacked(old, one, longest) for old, one in zip(before, new, strict=True)]
                  if before else new)  # fmt: skip

    def step_tokens(self, embeds_B1E: FloatArray) -> FloatArray:
        """Read one more row of each sequence; return its logits `[B, V]`."""
        positions_B1 = np.asarray(self.lengths, np.int64)[:, None]
        if self.in_place:
            # the operator reads off the mask how long each sequence is, and nothing else
            longest = max(self.lengths) + 1
            self._mask_BL = (np.arange(longest) <= positions_B1).astype(np.int64)
            logits_BV = self._run(self._bind(), embeds_B1E, positions_B1)[:, -1]
        else:
            logits_BV = self.step(embeds_B1E, positions_B1)
        self.lengths = [length + 1 for length in self.lengths]
        return logits_BV

    def leave(self, places: Sequence[int]) -> list[int]:
        """Free places; return which sequence, by its place before, is at each place now."""
        order = places_left(len(self.lengths), places)
        if not order:
            self.lengths, self._buffers = [], []
            self.release()
            return order
        if self.in_place:
            for place, source in enumerate(order):
                if place != source:
                    held = self.lengths[source]
                    for buffer in self._buffers:
                        buffer[place, :, :held] = buffer[source, :, :held]
            self.lengths = [self.lengths[source] for source in order]
            self._show()
        else:
            kept = self._compact(order)
            self.lengths = [self.lengths[source] for source in order]
            self._set([one[:, :, : max(self.lengths)] for one in kept])
        return order

    def _show(self) -> None:
        """Bind the places that are taken."""
        count = len(self.lengths)
        self._cache = [self._on_device(buffer[:count]) for buffer in self._buffers]
        self._binding = None

    def _set(self, caches: Sequence[CacheArray]) -> None:
        self._cache = [self._on_device(np.ascontiguousarray(one)) for one in caches]
        self._binding = None
        columns = np.arange(self._cache[0].shape()[2])
        self._mask_BL = (columns < np.asarray(self.lengths)[:, None]).astype(np.int64)

    def _compact(self, order: Sequence[int]) -> list[CacheArray]:
        """Return the cache of these sequences `[B, G, P, K]`, without the padding in between."""
        if not order:
            return []
        real: list[IntArray] = [np.flatnonzero(self._mask_BL[place]) for place in order]
        longest = max(map(len, real))
        found = []
        for value in self._cache:
            held_BGPK = value.numpy()
            shape = (len(order), held_BGPK.shape[1], longest, held_BGPK.shape[3])
            whole = np.zeros(shape, held_BGPK.dtype)
            for place, (source, columns) in enumerate(zip(order, real, strict=True)):
                whole[place, :, : len(columns)] = held_BGPK[source][:, columns]
            found.append(whole)
        return found


def _grown(held: CacheArray | None, like: CacheArray, places: int, rows: int) -> CacheArray:
    """Return a buffer with room for one more than `places` sequences of so many rows."""
    if held is not None and places < held.shape[0] and rows <= held.shape[2]:
        return held
    have = (0, 0) if held is None else (held.shape[0], held.shape[2])
    rows = max(have[1], -(-rows // _STEP) * _STEP)
    count = max(have[0], 1 << places.bit_length())
    grown = np.zeros((count, like.shape[1], rows, like.shape[3]), like.dtype)
    if held is not None:
        grown[: have[0], :, : have[1]] = held
    return grown


def _stacked(old: CacheArray, new: CacheArray, rows: int) -> CacheArray:
    """Return one cache behind another, both padded to `rows` rows."""
    padded = [np.pad(one, ((0, 0), (0, 0), (0, rows - one.shape[2]), (0, 0))) for one in (old, new)]
    return np.concatenate(padded)
