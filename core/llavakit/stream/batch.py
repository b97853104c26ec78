"""The packed stream: several samples laid end to end in one row of tokens, without padding.

T rows of the stream, S samples in it, N visual rows, M supervised rows, I images, E width.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from llavakit.stream.attention import KVCache, Watch
    from llavakit.stream.encode import Encoded


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`, without waiting for what a GPU has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from any other memory the host does wait
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Packing:
    """Where the samples of a stream begin and end. Attention never crosses a boundary."""

    starts: tuple[int, ...]
    """First row of each sample, then T: S + 1 numbers on the host, so that no kernel waits."""
    position_ids_T: Tensor
    """int64, counted from 0 in each sample (from the cache's length when decoding)."""
    cache: KVCache | None = None
    watch: Watch | None = None
    """Keeps the attention weights of some rows, where somebody wants to see them."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        """Return the packing of samples of these lengths."""
        starts = (0, *np.cumsum(np.asarray(lengths, dtype=np.int64)).tolist())
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
        return cls(starts, positions.to(device))

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.starts))

    @property
    def last_rows_S(self) -> Tensor:
        """The last row of each sample."""
        return upload(torch.tensor(self.starts[1:]) - 1, self.position_ids_T.device)

    @cached_property
    def bounds_S(self) -> Tensor:
        """`starts` on the device, int32, as attention kernels want it."""
        starts = torch.tensor(self.starts, dtype=torch.int32)
        return upload(starts, self.position_ids_T.device)

    @cached_property
    def samples_T(self) -> Tensor:
        """The number of the sample that each row belongs to, int32."""
        numbers = torch.arange(len(self.lengths), dtype=torch.int32)
        samples_T = numbers.repeat_interleave(torch.tensor(self.lengths))
        return upload(samples_T, self.position_ids_T.device)

    @cached_property
    def block_masks(self) -> dict[int | None, Any]:
        """FlexAttention's masks of this stream by window, kept for the layers to come."""
        return {}

    def to(self, device: torch.device) -> Packing:
        return replace(self, position_ids_T=upload(self.position_ids_T, device))


@dataclass(frozen=True)
class Rows:
    """Some rows of a stream, ascending."""

    index_M: Tensor
    """int64."""
    counts: tuple[int, ...]
    """How many of them lie in each sample, on the host."""


@dataclass(frozen=True)
class Stream:
    """What a connector needs to fill the stream with text and visual embeddings."""

    token_ids_T: Tensor
    """int64; 0 at visual rows, whose text embedding nobody sees."""
    visual_rows_N: Tensor
    """int64: the row of each visual token, images in order."""
    visual_kept_N: Tensor | None
    """int64 into the flattened `[I * P']` features where truncation cut some; None for all."""
    embed: Callable[[Tensor], Tensor]
    embedding_VE: Tensor | None
    """The table behind `embed` where that is a plain look-up."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch, ready for the device."""

    token_ids_T: Tensor
    packing: Packing
    visual_rows_N: Tensor
    visual_kept_N: Tensor | None
    target_rows: Rows
    """The rows whose next token is supervised."""
    targets_M: Tensor
    """int64: those next tokens."""
    samples: tuple[int, ...]
    """Index of each sample in its data set."""
    images: tuple[tuple[int, int], ...]
    """(sample, image of that sample) of each image, in order of their visual rows."""

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on `device`."""
        move = partial(upload, device=device)
        kept = self.visual_kept_N
        return replace(
            self,
            token_ids_T=move(self.token_ids_T),
            packing=self.packing.to(device),
            visual_rows_N=move(self.visual_rows_N),
            visual_kept_N=None if kept is None else move(kept),
            target_rows=replace(self.target_rows, index_M=move(self.target_rows.index_M)),
            targets_M=move(self.targets_M),
        )


def pack(encoded: Sequence[Encoded], samples: Sequence[int], visual_tokens: int) -> PackedBatch:
    """Lay encoded samples end to end.

    `visual_tokens` is P', the rows that one image takes; `samples` are the samples' indices.
    """
    token_ids, learned, visual, starts, images, kept = [], [], [], [0], [], []
    cut = False
    for index, item in zip(samples, encoded, strict=True):
        rows = item.expand(visual_tokens)
        token_ids.append(rows.token_ids)
        learned.append(rows.learned)
        visual.append(rows.visual)
        count = item.image_count
        images += [(index, number) for number in range(count)]
        full = count * visual_tokens
        cut |= rows.visual_count < full
        kept.append(np.arange(full) < rows.visual_count)
        starts.append(starts[-1] + len(rows.token_ids))
    ids_T = np.concatenate(token_ids)
    learned_T = np.concatenate(learned)
    # row t predicts token t + 1, within the sample; no first token is ever learned
    learned_T[np.asarray(starts[:-1])] = False
    target_rows = np.flatnonzero(learned_T) - 1
    counts = np.diff(np.searchsorted(target_rows, starts))
    return PackedBatch(
        token_ids_T=torch.from_numpy(ids_T),
        packing=Packing.of(np.diff(starts).tolist()),
        visual_rows_N=torch.from_numpy(np.flatnonzero(np.concatenate(visual))),
        visual_kept_N=torch.from_numpy(np.flatnonzero(np.concatenate(kept))) if cut else None,
        target_rows=Rows(torch.from_numpy(target_rows), tuple(counts.tolist())),
        targets_M=torch.from_numpy(ids_T[target_rows + 1]),
        samples=tuple(samples),
        images=tuple(images),
    )


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
        place = bisect_left(open_bins, (length,))
        if place == len(open_bins):
            bins.append([index])
            chosen, space = len(bins) - 1, capacity - length
        else:
            room, _, chosen = open_bins.pop(place)
            bins[chosen].append(index)
            space = room - length
        if space > 0:
            insort(open_bins, (space, -number, chosen))
    return [sorted(items) for items in bins]
