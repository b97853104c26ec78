"""The ids and loss masks of samples, as they are stored: many samples are written at once.

A sample's record is its ids, in two bytes each where the vocabulary allows it, and behind them its
loss mask, a bit a token. N samples, I uses of images, T tokens of all of them.
"""

from __future__ import annotations

from array import array

import numpy as np

from llavakit import IMAGE_ID, Encoded, Ids
from llavakit_plugins.datasets.columns import Column, Columns


class Records:
    """Collects samples, and writes those that were collected with a few calls of numpy."""

    def __init__(self, kind: np.dtype[np.signedinteger], max_length: int) -> None:
        self._kind, self._max_length = kind, max_length
        self.written = bytearray()
        self.ends = array("q")  #: Of each record in `written`.
        self.lengths, self.supervised = array("i"), array("i")
        """Of each sample: its rows of the stream, and those that are supervised, after the cut."""
        self.cut = 0  #: Samples that are longer than `max_length`.
        self._empty()

    def _empty(self) -> None:
        self.tokens = Ids(array("i"), bytearray())  #: Of the samples that are not written yet.
        self.images = array("i")  #: The rows of each of their images.
        self._ends = array("q", [0])

    def end(self) -> None:
        """Say that what was added to `tokens` and `images` since the last call is one sample."""
        self._ends.append(len(self.tokens.ids))

    def write(self) -> None:
        """Write the samples that were added."""
        ids_T = np.frombuffer(self.tokens.ids, np.intc)
        supervised_T = np.frombuffer(self.tokens.supervised, np.bool_)
        ends = np.asarray(self._ends)
        tokens_N = np.diff(ends)
        rows_T = np.ones(len(ids_T), np.int64)
        rows_T[ids_T == IMAGE_ID] = self.images
        row_ends = np.concatenate([[0], np.cumsum(rows_T)])
        rows_N = np.diff(row_ends[ends])
        # the row of its sample with which each token begins; nothing predicts the first one
        row_T = row_ends[:-1] - np.repeat(row_ends[ends[:-1]], tokens_N)
        learned_T = supervised_T & (row_T > 0) & (row_T < self._max_length)
        learned_N = np.diff(np.concatenate([[0], np.cumsum(learned_T)])[ends])
        self.cut += int((rows_N > self._max_length).sum())
        self.lengths.extend(np.minimum(rows_N, self._max_length).tolist())
        self.supervised.extend(learned_N.tolist())
        padded = np.zeros(int((tokens_N + -tokens_N % 8).sum()), np.bool_)
        padded[_alternating(tokens_N, -tokens_N % 8)] = supervised_T
        bits = np.packbits(padded)
        id_bytes_N, bit_bytes_N = tokens_N * self._kind.itemsize, -(-tokens_N // 8)
        are_ids = _alternating(id_bytes_N, bit_bytes_N)
        records = np.empty(len(are_ids), np.uint8)
        records[are_ids] = ids_T.astype(self._kind).view(np.uint8)
        records[~are_ids] = bits
        self.ends.extend((len(self.written) + np.cumsum(id_bytes_N + bit_bytes_N)).tolist())
        self.written += records.data
        self._empty()


def _alternating(yes_N: Column, no_N: Column) -> Column:
    """Return so many times True, so many times False, and so on."""
    counts = np.stack([yes_N, no_N], axis=1).ravel()
    return np.repeat(np.tile([True, False], len(yes_N)), counts)


def read_record(columns: Columns, sample: int, max_length: int) -> Encoded:
    """Return the ids (int64) and the loss mask (bool) of one sample."""
    ends, kind = columns["record_ends"], np.dtype(columns.facts["token_type"])
    begin = int(ends[sample - 1]) if sample else 0
    record = columns["records"][begin : int(ends[sample])]
    # n tokens take n * width + ceil(n / 8) bytes
    count = 8 * len(record) // (8 * kind.itemsize + 1)
    ids, bits = np.split(record, [count * kind.itemsize])
    supervised = np.unpackbits(bits, count=count).astype(np.bool_)
    # a copy is aligned, and a record in the file need not be
    return Encoded(np.frombuffer(ids.tobytes(), kind).astype(np.int64), supervised, max_length)
